"""The components as torch modules with the tensors of `ports`: what is exported, and what graphs are verified against.

Numbers that belong to the checkpoint, such as the autoencoder's scaling factor, are inside the modules: whoever
runs the graphs needs none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from diffuserve.spec import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint import Checkpoint, Part
from diffuserve_export.errors import CheckpointError
from diffuserve_export.ports import PART_OF

__all__ = ["TextEncoder", "UNet", "VaeDecoder", "VaeEncoder", "module_of"]


class TextEncoder(nn.Module):
    """`input_ids` INT32 [rows,77] -> `hidden_states` [rows,77,D], after the final layer norm, and `pooled` [rows,D]."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        # The exporter has no kernel for the argmax over int32 that finds the last token, hence int64 inside.
        output = self.model(input_ids.to(torch.int64))
        return output.last_hidden_state, output.pooler_output


class UNet(nn.Module):
    """`sample` [rows,C,h,w], `timestep` FP32 [rows], `encoder_hidden_states` [rows,tokens,D] -> `model_output`.

    Each row has its own timestep. `model_output` has the shape of `sample`.
    """

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class VaeDecoder(nn.Module):
    """`latents` [rows,4,h,w] as the UNet uses them -> `pixels` [rows,3,H,W], about -1 to 1, not clamped."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model
        self.factor = float(model.config.scaling_factor)
        self.shift = float(getattr(model.config, "shift_factor", None) or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.model.decode(latents / self.factor + self.shift, return_dict=False)[0]
        return output


class VaeEncoder(nn.Module):
    """`pixels` [rows,3,H,W] in -1 to 1 -> `moments` [rows,2C,h,w]: mean, then standard deviation, scaled.

    Both halves are as the UNet uses them, times the scaling factor. The second is a standard deviation, not the
    logarithm of a variance that diffusers keeps: the latents of a picture are `mean + std * noise`, with no number of
    the checkpoint in the formula. diffusers' clamp of the logarithm to -30..20 is inside.
    """

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model
        self.factor = float(model.config.scaling_factor)
        self.shift = float(getattr(model.config, "shift_factor", None) or 0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([(posterior.mean - self.shift) * self.factor, posterior.std * self.factor], dim=1)


_MODULES: Mapping[str, tuple[Any, Any]] = {
    TEXT_ENCODER: (CLIPTextModel, TextEncoder),
    UNET: (UNet2DConditionModel, UNet),
    VAE_DECODER: (AutoencoderKL, VaeDecoder),
    VAE_ENCODER: (AutoencoderKL, VaeEncoder),
}


def module_of(checkpoint: Checkpoint, component: str) -> nn.Module:
    """Load a component in float32, whatever its weights are stored in. Raises CheckpointError where they do not fit."""
    model_class, module_class = _MODULES[component]
    part = checkpoint.parts[PART_OF[component]]
    module: nn.Module = module_class(_load(checkpoint, part, model_class))
    return module.eval().requires_grad_(False)


def _load(checkpoint: Checkpoint, part: Part, model_class: Any) -> nn.Module:
    dtype = "dtype" if model_class is CLIPTextModel else "torch_dtype"
    transformers_logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            checkpoint.root,
            subfolder=part.name,
            variant=part.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{dtype: torch.float32},
        )
    except Exception as error:  # whatever either library raises for weights that do not fit their config
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the {part.name} of {checkpoint.root} cannot be loaded: {reason}") from error
    lacking = sorted(info["missing_keys"]) + sorted(str(one) for one in info["mismatched_keys"])
    if lacking:
        raise CheckpointError(
            f"the {part.name} of {checkpoint.root} lacks weights, or has them in another shape: "
            f"{len(lacking)} of them, first {lacking[0]}"
        )
    loaded: nn.Module = model
    return loaded
