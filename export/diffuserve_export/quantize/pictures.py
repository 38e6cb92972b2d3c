"""The pictures that a UNet makes, through diffusers' own pipeline: what scales are found on, and drift is seen in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffuserve.spec import SAMPLE_LATENTS, UNET
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.tokenizer import clip_tokenizer
from diffuserve_export.weights import load_part

__all__ = ["Run", "Studio"]

#: What a UNet makes of its inputs, which come in the order of its ports, in float32.
Run = Callable[[Sequence[Tensor]], Tensor]

# Latents of the pictures that are made at once: one picture of SD1.5, or 64 of the shapes checkpoint.
_LATENTS_AT_ONCE: Final = 64 * 64


class Studio:
    """Everything of a checkpoint but its UNet, in float32. Pictures have `size` pixels a side, and take `steps` steps.

    Guidance is the checkpoint's own. Everything is seeded: the same UNet makes the same pictures.
    """

    def __init__(self, checkpoint: Checkpoint, size: int, steps: int) -> None:
        self.checkpoint, self.size, self.steps = checkpoint, size, steps
        self.pipeline = _pipeline(checkpoint)
        self.pipeline.set_progress_bar_config(disable=True)

    def pictures(self, run: Run, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """A picture for each prompt, from the noise of its seed: [pictures, 3, size, size], 0 to 1."""
        return self._made(run, prompts, seeds, "pt")

    def run(self, run: Run, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """The same without decoding anything, for what `run` sees of it."""
        self._made(run, prompts, seeds, "latent")

    def _made(self, run: Run, prompts: Sequence[str], seeds: Sequence[int], kind: str) -> Tensor:
        side = self.size // self.checkpoint.latent_scale
        many = max(1, _LATENTS_AT_ONCE // (side * side))
        self.pipeline.unet.forward = _forward(run)
        made = []
        for start in range(0, len(prompts), many):
            some, generators = prompts[start : start + many], map(_generator, seeds[start : start + many])
            inpainted = {} if self.checkpoint.family.sample == SAMPLE_LATENTS else _to_inpaint(self.size, len(some))
            output = self.pipeline(
                prompt=list(some),
                width=self.size,
                height=self.size,
                num_inference_steps=self.steps,
                guidance_scale=self.checkpoint.guidance_scale,
                generator=list(generators),
                output_type=kind,
                **inpainted,
            )
            made.append(output.images)
        return torch.cat(made)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _to_inpaint(size: int, pictures: int) -> dict[str, Any]:
    """A picture of soft noise, of which the left half is to be made new."""
    rough = torch.rand((pictures, 3, 8, 8), generator=_generator(pictures)) * 2 - 1
    image = torch.nn.functional.interpolate(rough, size=(size, size), mode="bilinear")
    mask = torch.zeros(pictures, 1, size, size)
    mask[..., : size // 2] = 1
    return {"image": image, "mask_image": mask, "strength": 1.0}


def _forward(run: Run) -> Callable[..., tuple[Tensor]]:
    """`run` in the place of a diffusers UNet's forward."""

    def forward(
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        added = added_cond_kwargs or {}
        named = [added.get("text_embeds"), added.get("time_ids"), timestep_cond]
        rows = torch.as_tensor(timestep, dtype=torch.float32).expand(len(sample))
        inputs = [sample, rows, encoder_hidden_states, *(one for one in named if one is not None)]
        with torch.no_grad():
            return (run(inputs).float(),)

    return forward


def _pipeline(checkpoint: Checkpoint) -> Any:
    """The family's plain pipeline. Its UNet has a config and no weights: `_forward` stands for it."""
    family = checkpoint.family
    name = family.pipeline_classes[0]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(checkpoint.parts[UNET].config))
    parts: dict[str, Any] = {"unet": unet, "vae": load_part(checkpoint, checkpoint.parts["vae"])}
    for encoder in family.encoders:
        parts[encoder] = load_part(checkpoint, checkpoint.parts[encoder])
        parts[encoder.replace("text_encoder", "tokenizer")] = clip_tokenizer(checkpoint, encoder)
    scheduler = getattr(diffusers, checkpoint.scheduler["_class_name"]).from_config(dict(checkpoint.scheduler))
    if family.text_embeds:
        parts["force_zeros_for_empty_prompt"] = checkpoint.zero_empty_negative
        parts["add_watermarker"] = False
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family.sample != SAMPLE_LATENTS:
        name = name.replace("Pipeline", "InpaintPipeline")
    return getattr(diffusers, name)(scheduler=scheduler, **parts)
