"""Which layers of a UNet are quantized, and to what: tables, with where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from diffuserve_export.quantize.layers import FLOAT8, INT4, INT4_BLOCK, INT8, Number

__all__ = ["LEFT_ALONE", "RECIPES", "Layer", "Recipe", "choose_layers", "recipe_of"]

# Parts of a UNet that are left in half precision, and why. The list is that of NVIDIA's own pipelines: `filter_func`
# in TensorRT's demo/Diffusion/demo_diffusion/utils_modelopt.py, and in ModelOpt's examples/diffusers/quantization.
LEFT_ALONE: Final = {
    "time_embedding": "embeds the timestep",
    "add_embedding": "embeds the size of the picture",
    "time_emb_proj": "adds the timestep to every channel",
    "conv_in": "the first layer",
    "conv_out": "the last layer",
    "conv_shortcut": "carries a block's input past it",
    "proj_out": "the last layer of a transformer, added to its input",
}
_WIDTH: Final = f"its width is no multiple of {INT4_BLOCK}"
_CONVOLUTION: Final = "a convolution"
_ISLAND: Final = "needs float32"


@dataclass(frozen=True, slots=True)
class Layer:
    """What a kind of layer is quantized to: its weights, and what goes into it, if that is quantized as well."""

    weight: Number
    inputs: Number | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """`algorithm` is ModelOpt's, with its options. `convolution` is None where convolutions are left alone."""

    linear: Layer
    convolution: Layer | None
    algorithm: Mapping[str, object]


_INT8: Final = Layer(INT8, INT8)
_FP8: Final = Layer(FLOAT8, FLOAT8)

# SmoothQuant's alpha is the one of NVIDIA's pipelines, and more than what suits language models: activations of a
# UNet vary more than its weights.
RECIPES: Final = {
    "int8": Recipe(_INT8, _INT8, {"method": "smoothquant", "alpha": 0.8}),
    "fp8": Recipe(_FP8, _FP8, {"method": "max"}),
    "int4": Recipe(Layer(INT4, None), _INT8, {"method": "max"}),
}


def recipe_of(precision: str, target: str) -> Recipe:
    """TensorRT-RTX has fp8 for matrix products only, its documentation says."""
    recipe = RECIPES[precision]
    if precision == "fp8" and target == "tensorrt-rtx":
        return Recipe(recipe.linear, None, recipe.algorithm)
    return recipe


def choose_layers(
    module: nn.Module, recipe: Recipe, islands: Sequence[str] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers of `module` to quantize, by name, and of the others why they are left alone.

    `islands` are modules that are computed in float32.
    """
    chosen, left = dict[str, Layer](), dict[str, str]()
    for name, one in module.named_modules():
        if not isinstance(one, (nn.Linear, nn.Conv2d)):
            continue
        layer = recipe.linear if isinstance(one, nn.Linear) else recipe.convolution
        reasons = [reason for part, reason in LEFT_ALONE.items() if part in name.split(".")]
        if any(name == island or not island or name.startswith(f"{island}.") for island in islands):
            reasons.append(_ISLAND)
        if layer is None:
            reasons.append(_CONVOLUTION)
        elif layer.weight is INT4 and isinstance(one, nn.Linear) and one.in_features % INT4_BLOCK:
            reasons.append(_WIDTH)
        if layer is None or reasons:
            left[name] = reasons[0]
        else:
            chosen[name] = layer
    return chosen, left
