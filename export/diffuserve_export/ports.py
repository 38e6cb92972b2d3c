"""The tensors of each component, and the ranges that an export is made for."""

from __future__ import annotations

from diffuserve.errors import InvalidArgumentError
from diffuserve.manifest import Range, TensorShape
from diffuserve.spec import LATENTS, PIXELS, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import OptionError
from diffuserve_export.options import DEFAULT_OPT_ROWS, ExportOptions

__all__ = ["PART_OF", "Ports", "ports_of", "row_range", "size_range"]

Ports = tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]
PART_OF = {TEXT_ENCODER: "text_encoder", UNET: "unet", VAE_DECODER: "vae", VAE_ENCODER: "vae"}

_LATENT_SIDES = ("latent_height", "latent_width")
_PIXEL_SIDES = ("height", "width")


def ports_of(checkpoint: Checkpoint) -> dict[str, Ports]:
    """Inputs and outputs by component. Dimensions that vary are names, the same in every tensor of a component."""
    channels, tokens = checkpoint.latent_channels, checkpoint.token_limit
    width = int(checkpoint.parts["text_encoder"].config["hidden_size"])
    context = int(checkpoint.parts["unet"].config["cross_attention_dim"])
    latents = ("rows", channels, *_LATENT_SIDES)
    pixels = TensorShape(PIXELS, "FP32", ("rows", 3, *_PIXEL_SIDES))
    return {
        TEXT_ENCODER: (
            (TensorShape("input_ids", "INT32", ("rows", tokens)),),
            (
                TensorShape("hidden_states", "FP32", ("rows", tokens, width)),
                TensorShape("pooled", "FP32", ("rows", width)),
            ),
        ),
        UNET: (
            (
                TensorShape("sample", "FP32", latents),
                TensorShape("timestep", "FP32", ("rows",)),
                TensorShape("encoder_hidden_states", "FP32", ("rows", "tokens", context)),
            ),
            (TensorShape("model_output", "FP32", latents),),
        ),
        VAE_DECODER: ((TensorShape(LATENTS, "FP32", latents),), (pixels,)),
        VAE_ENCODER: (
            (pixels,),
            (TensorShape("moments", "FP32", ("rows", 2 * channels, *_LATENT_SIDES)),),
        ),
    }


def size_range(checkpoint: Checkpoint, options: ExportOptions) -> Range:
    """Widths and heights in pixels. Raises OptionError where `options.sizes` is out of the checkpoint's step."""
    step, family = checkpoint.size_step, checkpoint.family
    own = checkpoint.sample_size * checkpoint.latent_scale
    low = max(step, int(own * family.min_size_factor) // step * step)
    opt = max(low, own // step * step)
    high = max(opt, int(own * family.max_size_factor) // step * step)
    numbers = options.size_numbers or (low, opt, high)
    try:
        return Range(*numbers, step=step)
    except InvalidArgumentError as error:
        raise OptionError(
            f"sizes is {':'.join(map(str, numbers))}, and must be min:opt:max, rising, each a multiple of {step}"
        ) from error


def row_range(options: ExportOptions) -> Range:
    """Rows of one UNet call."""
    return Range(1, min(DEFAULT_OPT_ROWS, options.max_rows), options.max_rows)
