"""Scales of a UNet's layers, found by ModelOpt in the denoising loop, and the layers with their weights rounded."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffuserve_export.quantize.layers import (
    INT4,
    INT4_BLOCK,
    INT8,
    Number,
    QuantizedConv2d,
    QuantizedLinear,
    rounded,
)
from diffuserve_export.quantize.recipes import Layer, Recipe

__all__ = ["calibrated_layers", "replace_layers"]


def calibrated_layers(
    module: nn.Module, recipe: Recipe, layers: Mapping[str, Layer], loop: Callable[[nn.Module], None]
) -> dict[str, nn.Module]:
    """Quantized layers by the name of the one they stand for. `loop` runs the module on what it is calibrated with.

    ModelOpt changes `module`, which is of no use afterwards.
    """
    with _quiet():
        import modelopt.torch.quantization as mtq

        config = {"quant_cfg": _quantizers(layers), "algorithm": dict(recipe.algorithm)}
        mtq.quantize(module, config, forward_loop=loop)
    converted = dict(module.named_modules())
    made = dict[str, nn.Module]()
    for name, layer in layers.items():
        made[name] = _quantized(converted[name], layer)
        converted[name].weight = None  # two copies of all weights would not fit
    return made


def _quantizers(layers: Mapping[str, Layer]) -> list[dict[str, Any]]:
    """ModelOpt's list of what quantizes what; later entries count."""
    quantizers: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, layer in layers.items():
        quantizers.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": _weight_config(layer.weight)})
        if layer.inputs is not None:
            config = {"num_bits": _bits(layer.inputs), "axis": None}
            quantizers.append({"quantizer_name": f"{name}.input_quantizer", "cfg": config})
    return quantizers


def _weight_config(number: Number) -> dict[str, Any]:
    if number is INT4:
        return {"num_bits": 4, "block_sizes": {-1: INT4_BLOCK, "type": "static"}}
    return {"num_bits": _bits(number), "axis": 0 if number is INT8 else None}


def _bits(number: Number) -> int | tuple[int, int]:
    """In ModelOpt's words: of the exponent and of the mantissa, where there are such."""
    return (4, 3) if number.dtype.is_floating_point else 8


def _quantized(layer: Any, kind: Layer) -> nn.Module:
    weight = layer.weight.detach().t() if isinstance(layer, nn.Linear) else layer.weight.detach()
    scale, spread = _scale(weight, kind.weight, channel=weight.ndim - 1 if isinstance(layer, nn.Linear) else 0)
    bias = None if layer.bias is None else layer.bias.detach()
    arguments: dict[str, Any] = {"smoothing": layer.input_quantizer.pre_quant_scale}
    if kind.inputs is not None:
        arguments["input_number"] = kind.inputs
        arguments["input_scale"] = _half(layer.input_quantizer.amax / kind.inputs.limit).reshape(())
    values = rounded(weight / spread, kind.weight).contiguous()
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(values, scale, bias, **arguments)
    return QuantizedConv2d(layer, values, scale, bias, **arguments)


def _scale(weight: Tensor, number: Number, channel: int) -> tuple[Tensor, Tensor]:
    """As the layer holds it, and as it is divided by. A channel of zeros gets the scale of the largest."""
    if number is INT4:
        scale = _half(weight.unflatten(0, (-1, INT4_BLOCK)).abs().amax(1) / number.limit)
        return scale, scale.repeat_interleave(INT4_BLOCK, dim=0)
    if number is INT8:
        others = [axis for axis in range(weight.ndim) if axis != channel]
        spread = _half(weight.abs().amax(others, keepdim=True) / number.limit)
        return spread.flatten(), spread
    scale = _half(weight.abs().max() / number.limit)
    return scale, scale


def _half(scale: Tensor) -> Tensor:
    """In float32, with the value that half precision has for it: weights are rounded by what the graph will hold."""
    tiny = torch.finfo(torch.float16).tiny
    return scale.detach().float().clamp(min=tiny).to(torch.float16).float()


def replace_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put `layers` in the place of those whose names they have."""
    for name, layer in layers.items():
        parent, _, key = name.rpartition(".")
        setattr(module.get_submodule(parent), key, layer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ModelOpt prints on each layer, and on extensions that it has for GPUs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
