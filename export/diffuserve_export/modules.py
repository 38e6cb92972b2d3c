"""The components as torch modules with the tensors of `ports`: what is exported, and what graphs are verified against.

Numbers that belong to the checkpoint, such as the autoencoder's scaling factor, are inside the modules: whoever
runs the graphs needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from diffuserve.spec import PREVIEW_DECODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint import CONTROLNET, Checkpoint, part_of
from diffuserve_export.lora import Adapters
from diffuserve_export.weights import load_part

__all__ = ["TextEncoder", "UNet", "VaeDecoder", "VaeEncoder", "module_of"]


class _Vocabulary(nn.Module):
    """Token ids [rows,77] -> vectors [rows,77,D]: the encoder's own, of later ids those of `further` [vectors,D]."""

    def __init__(self, own: nn.Embedding) -> None:
        super().__init__()
        self.own = own
        #: A list, since the exporter takes tensors that are set as attributes for weights.
        self.further: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        (further,) = self.further
        size = self.own.num_embeddings
        # Two lookups rather than one in a table of both, which would be copied in every call.
        theirs = nn.functional.embedding((ids - size).clamp(min=0), further)
        return torch.where((ids >= size)[..., None], theirs, self.own(ids.clamp(max=size - 1)))


class TextEncoder(nn.Module):
    """`input_ids`, `clip_skip` INT32 [rows,77] and [rows], `embeddings` [vectors,D] -> `hidden_states`, `pooled`.

    `hidden_states` [rows,77,D] are of the family's layer: -1 is the last one after the final layer norm, -2 the one
    before it as it is. A row's `clip_skip`, 0 to `most_skipped`, counts layers back from there; the norm stays, as in
    diffusers. `pooled` [rows,D] is of the last layer always, and projected where the encoder has a projection. Ids
    beyond the vocabulary are of `embeddings`, which has one row at least. Last, with adapters: `lora` and `lora_index`.
    """

    def __init__(self, model: Any, hidden_layer: int, most_skipped: int) -> None:
        super().__init__()
        self.model, self.hidden_layer, self.most_skipped = model, hidden_layer, most_skipped
        text_model = getattr(model, "text_model", model)
        # The token that ends a prompt. Configs that say 2 are from before that was put right; transformers then takes
        # the largest id, which here may be one of `embeddings`. CLIP's own is its last.
        if text_model.eos_token_id == 2:
            text_model.eos_token_id = text_model.config.vocab_size - 1
        self.vocabulary = text_model.embeddings.token_embedding = _Vocabulary(text_model.embeddings.token_embedding)
        self.norm = text_model.final_layer_norm
        self.adapters: Adapters | None = None

    def forward(
        self, input_ids: Tensor, clip_skip: Tensor, embeddings: Tensor, *further: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.adapters:
            self.adapters.take(further)
        self.vocabulary.further[:] = [embeddings]
        # The exporter has no kernel for the argmax over int32 that finds the last token, hence int64 inside.
        output = self.model(input_ids.to(torch.int64), output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        layers = output.hidden_states[self.hidden_layer :: -1][: self.most_skipped + 1]
        hidden = layers[0]
        for skipped, layer in enumerate(layers[1:], start=1):
            hidden = torch.where((clip_skip == skipped)[:, None, None], layer, hidden)
        return self.norm(hidden) if self.hidden_layer == -1 else hidden, pooled


class _InTypeOf(nn.Module):
    """What `module` gives, in the type of the weights of `reader`, which reads it."""

    def __init__(self, module: nn.Module, reader: Callable[[], Tensor]) -> None:
        super().__init__()
        self.module, self.reader = module, reader

    def forward(self, value: Tensor) -> Tensor:
        output: Tensor = self.module(value)
        return output.to(self.reader().dtype)


class UNet(nn.Module):
    """`sample` [rows,C,h,w], `timestep` FP32 [rows], `encoder_hidden_states` [rows,tokens,D] -> `model_output`.

    Each row has its own timestep. `model_output` has the latents' shape. Further inputs, by what the UNet has:
    `text_embeds` [rows,P] and `time_ids` FP32 [rows,6]; `timestep_cond` [rows,E]; with a ControlNet (Zhang et al. 2023)
    `control` [rows,3,8h,8w] in 0 to 1 and `control_scale` [rows], by which what it adds to the row is multiplied; last,
    with adapters, `lora` and `lora_index`.
    """

    def __init__(self, model: UNet2DConditionModel, controlnet: ControlNetModel | None = None) -> None:
        super().__init__()
        self.model, self.controlnet = model, controlnet
        self.adapters: Adapters | None = None
        self.takes_time_ids = model.config.addition_embed_type == "text_time"
        self.takes_guidance = model.config.time_cond_proj_dim is not None
        for one in (model, controlnet) if self.takes_time_ids else ():
            if one is not None:
                _time_ids_in_its_type(one)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *further: Tensor) -> Tensor:
        added, rest = {}, self.adapters.take(further) if self.adapters else list(further)
        if self.takes_time_ids:
            added = {"text_embeds": rest.pop(0), "time_ids": rest.pop(0)}
        guidance = rest.pop(0) if self.takes_guidance else None
        residuals = {}
        if self.controlnet is not None:
            control, scale = rest.pop(0), rest.pop(0)
            # Of an inpainting UNet's `sample`, as diffusers: the latents alone.
            latents = sample[:, : self.controlnet.config.in_channels]
            down, mid = self.controlnet(
                latents,
                timestep,
                encoder_hidden_states,
                control,
                conditioning_scale=scale[:, None, None, None],
                added_cond_kwargs=added,
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
        output: Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=guidance,
            added_cond_kwargs=added,
            return_dict=False,
            **residuals,
        )[0]
        return output


def _time_ids_in_its_type(model: Any) -> None:
    """diffusers concatenates the float32 embedding of `time_ids` with `text_embeds`, whatever that is in."""
    model.add_time_proj = _InTypeOf(model.add_time_proj, lambda: model.add_embedding.linear_1.weight)


class VaeDecoder(nn.Module):
    """`latents` [rows,4,h,w] as the UNet uses them -> `pixels` [rows,3,H,W], about -1 to 1, not clamped."""

    def __init__(self, model: AutoencoderKL | AutoencoderTiny) -> None:
        super().__init__()
        self.model = model
        self.scale, self.shift = _scale_and_shift(model)

    def forward(self, latents: Tensor) -> Tensor:
        scale, shift = self.scale.to(latents.dtype), self.shift.to(latents.dtype)
        output: Tensor = self.model.decode(latents / scale + shift, return_dict=False)[0]
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
        self.scale, self.shift = _scale_and_shift(model)

    def forward(self, pixels: Tensor) -> Tensor:
        posterior = self.model.encode(pixels).latent_dist
        scale, shift = self.scale.to(pixels.dtype), self.shift.to(pixels.dtype)
        return torch.cat([(posterior.mean - shift) * scale, posterior.std * scale], dim=1)


def _scale_and_shift(model: AutoencoderKL | AutoencoderTiny) -> tuple[Tensor, Tensor]:
    """Of latents x as the autoencoder has them: the UNet uses (x - shift) * scale. A number, or one a channel."""
    config = model.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean and deviation:
        scale, shift = config.scaling_factor / torch.tensor(deviation), torch.tensor(mean)
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    return torch.tensor(float(config.scaling_factor)), torch.tensor(float(getattr(config, "shift_factor", None) or 0))


def _wrapper(component: str, checkpoint: Checkpoint) -> Callable[[Any], nn.Module]:
    others: Mapping[str, Callable[[Any], nn.Module]] = {
        UNET: lambda model: UNet(model, _controlnet(checkpoint)),
        VAE_DECODER: VaeDecoder,
        VAE_ENCODER: VaeEncoder,
        PREVIEW_DECODER: VaeDecoder,
    }
    return others.get(component, lambda model: TextEncoder(model, checkpoint.family.hidden_layer, checkpoint.clip_skip))


def _controlnet(checkpoint: Checkpoint) -> Any:
    return load_part(checkpoint, checkpoint.parts[CONTROLNET]) if CONTROLNET in checkpoint.parts else None


def module_of(checkpoint: Checkpoint, component: str) -> nn.Module:
    """Load a component in float32, whatever its weights are stored in. Raises CheckpointError where they do not fit."""
    model = load_part(checkpoint, checkpoint.parts[part_of(component)])
    return _wrapper(component, checkpoint)(model).eval().requires_grad_(False)
