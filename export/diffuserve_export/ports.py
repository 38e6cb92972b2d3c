"""The tensors of each component, and the ranges that an export is made for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Range, TensorShape
from diffuserve.spec import (
    CLIP_SKIP,
    EMBEDDINGS,
    INPUT_IDS,
    LATENTS,
    PIXELS,
    PREVIEW_DECODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
)
from diffuserve_export.checkpoint import Checkpoint, Part
from diffuserve_export.errors import OptionError
from diffuserve_export.options import DEFAULT_OPT_ROWS, ExportOptions

__all__ = ["DATATYPES", "Ports", "ports_of", "row_range", "size_range", "vae_range", "with_lora"]

Ports = tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]
#: Triton's names of the precisions.
DATATYPES: Final = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}

_LATENT_SIDES = ("latent_height", "latent_width")
_PIXEL_SIDES = ("height", "width")


def ports_of(checkpoint: Checkpoint, precisions: Mapping[str, str] = MappingProxyType({})) -> dict[str, Ports]:
    """Inputs and outputs by component. Dimensions that vary are names, the same in every tensor of a component.

    `precisions` are the components', float32 by default. `timestep` and `time_ids` are FP32 in any: fp16 has no 721.37.
    """
    types = {name: DATATYPES[precisions.get(name, "fp32")] for name in checkpoint.components}
    channels = checkpoint.latent_channels
    encoders = {name: _encoder_ports(checkpoint, name, types[name]) for name in checkpoint.family.encoders}
    decoders = {name: _decoder_ports(channels, types[name]) for name in types if name in (VAE_DECODER, PREVIEW_DECODER)}
    return {
        **encoders,
        **decoders,
        UNET: (
            _unet_inputs(checkpoint, types[UNET]),
            (TensorShape("model_output", types[UNET], ("rows", channels, *_LATENT_SIDES)),),
        ),
        VAE_ENCODER: (
            (TensorShape(PIXELS, types[VAE_ENCODER], ("rows", 3, *_PIXEL_SIDES)),),
            (TensorShape("moments", types[VAE_ENCODER], ("rows", 2 * channels, *_LATENT_SIDES)),),
        ),
    }


def with_lora(ports: Ports, size: int) -> Ports:
    """The ports of a component that takes adapters of `size` numbers, in the precision of its output."""
    inputs, outputs = ports
    lora = TensorShape(LORA, outputs[0].datatype, ("adapters", size)), TensorShape(LORA_INDEX, "INT64", ("rows",))
    return (*inputs, *lora), outputs


def _decoder_ports(channels: int, datatype: str) -> Ports:
    return (
        (TensorShape(LATENTS, datatype, ("rows", channels, *_LATENT_SIDES)),),
        (TensorShape(PIXELS, datatype, ("rows", 3, *_PIXEL_SIDES)),),
    )


def _encoder_ports(checkpoint: Checkpoint, name: str, datatype: str) -> Ports:
    """Inputs in the order of `modules.TextEncoder.forward`."""
    part, tokens = checkpoint.parts[name], checkpoint.token_limit
    width = int(part.config["hidden_size"])
    return (
        (
            TensorShape(INPUT_IDS, "INT32", ("rows", tokens)),
            TensorShape(CLIP_SKIP, "INT32", ("rows",)),
            TensorShape(EMBEDDINGS, datatype, ("vectors", width)),
        ),
        (
            TensorShape("hidden_states", datatype, ("rows", tokens, width)),
            TensorShape("pooled", datatype, ("rows", _pooled_width(part))),
        ),
    )


def _pooled_width(part: Part) -> int:
    projected = part.class_name.endswith("WithProjection")
    return int(part.config.get("projection_dim", 512) if projected else part.config["hidden_size"])


def _unet_inputs(checkpoint: Checkpoint, datatype: str) -> tuple[TensorShape, ...]:
    """In the order of `modules.UNet.forward`."""
    family, config = checkpoint.family, checkpoint.parts[UNET].config
    inputs = [
        TensorShape("sample", datatype, ("rows", checkpoint.sample_channels, *_LATENT_SIDES)),
        TensorShape("timestep", "FP32", ("rows",)),
        TensorShape("encoder_hidden_states", datatype, ("rows", "tokens", int(config["cross_attention_dim"]))),
    ]
    if family.time_ids:
        width = _pooled_width(checkpoint.parts[family.text_embeds])
        inputs.append(TensorShape("text_embeds", datatype, ("rows", width)))
        inputs.append(TensorShape("time_ids", "FP32", ("rows", len(family.time_ids))))
    if checkpoint.guidance_embedding:
        inputs.append(TensorShape("timestep_cond", datatype, ("rows", checkpoint.guidance_embedding)))
    return tuple(inputs)


def size_range(checkpoint: Checkpoint, options: ExportOptions) -> Range:
    """Widths and heights in pixels. Raises OptionError where `options.sizes` is out of the checkpoint's step."""
    step, family = checkpoint.size_step, checkpoint.family
    own = checkpoint.sample_size * checkpoint.latent_scale
    low = max(step, int(own * family.min_size) // step * step)
    opt = max(low, own // step * step)
    high = max(opt, int(own * family.max_size) // step * step)
    numbers = options.size_numbers or (low, opt, high)
    try:
        return Range(*numbers, step=step)
    except InvalidArgumentError as error:
        raise OptionError(
            f"sizes is {':'.join(map(str, numbers))}, and must be min:opt:max, rising, each a multiple of {step}"
        ) from error


def vae_range(checkpoint: Checkpoint, size: Range, options: ExportOptions) -> Range:
    """Sides in pixels of what the autoencoder takes in one piece, of pictures in `size`. Raises OptionError."""
    own, given = checkpoint.sample_size * checkpoint.latent_scale, options.vae_tile
    if given and (given % size.step or given < size.min):
        raise OptionError(
            f"vae-tile is {given}, and must be a multiple of {size.step} from {size.min}, the smallest picture's side"
        )
    most = min(size.max, given) if given else size.fit(int(own * checkpoint.family.vae_tile))
    return Range(size.min, min(size.opt, most), most, step=size.step)


def row_range(options: ExportOptions) -> Range:
    """Rows of one UNet call."""
    return Range(1, min(DEFAULT_OPT_ROWS, options.max_rows), options.max_rows)
