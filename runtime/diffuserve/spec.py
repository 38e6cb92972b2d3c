"""What each family of checkpoints is made of: one frozen table, and the only place that knows families by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FAMILIES", "LATENTS", "PIXELS", "TEXT_ENCODER", "UNET", "VAE_DECODER", "VAE_ENCODER", "Family"]

TEXT_ENCODER: Final = "text_encoder"
UNET: Final = "unet"
VAE_DECODER: Final = "vae_decoder"
VAE_ENCODER: Final = "vae_encoder"

# Names of the tensors that the loop, the export and the component models agree on.
LATENTS: Final = "latents"
PIXELS: Final = "pixels"


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
