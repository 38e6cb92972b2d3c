"""What each family of checkpoints is made of: one frozen table, and the only place that knows families by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = [
    "FAMILIES",
    "LATENTS",
    "PIXELS",
    "TARGET_DEVICES",
    "TEXT_ENCODER",
    "UNET",
    "VAE_DECODER",
    "VAE_ENCODER",
    "Family",
    "device_kind",
]

TEXT_ENCODER: Final = "text_encoder"
UNET: Final = "unet"
VAE_DECODER: Final = "vae_decoder"
VAE_ENCODER: Final = "vae_encoder"

# Names of the tensors that the loop, the export and the component models agree on.
LATENTS: Final = "latents"
PIXELS: Final = "pixels"

# Where the engines of each export target keep their tensors, in torch's words.
TARGET_DEVICES: Final = {
    "onnxruntime-cpu": "cpu",
    "onnxruntime": "cuda",
    "tensorrt": "cuda",
    "tensorrt-rtx": "cuda",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    `pipeline_classes` are the diffusers pipelines whose folders belong to it. `guidance_scale` is the default of a
    request that gives none. Sizes range from `min_size_factor` to `max_size_factor` times the checkpoint's own.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    components: tuple[str, ...]
    guidance_scale: float
    min_size_factor: float = 0.5
    max_size_factor: float = 3.0


FAMILIES: Final = {
    family.name: family
    for family in (
        Family(
            name="sd15",
            pipeline_classes=("StableDiffusionPipeline",),
            components=(TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER),
            guidance_scale=7.5,
        ),
    )
}


def device_kind(targets: Iterable[str]) -> str:
    """The kind of device that serves exports for these targets together. Raises ValueError where none does."""
    wanted = sorted(set(targets))
    if unknown := [target for target in wanted if target not in TARGET_DEVICES]:
        raise ValueError(f"the target {unknown[0]!r} is not one of {', '.join(TARGET_DEVICES)}; export again")
    kinds = {TARGET_DEVICES[target] for target in wanted}
    if len(kinds) != 1:
        raise ValueError(
            f"one denoising loop runs on one device, and the targets {', '.join(wanted)} need {len(kinds)}; "
            "export the checkpoints for one kind of device, or into two deployments"
        )
    return kinds.pop()
