"""What quantization saves of the full-size UNets: their bytes counted on architectures without weights.

A layer's weight takes its bits, a scale for each output channel (int8), each block of inputs and channel (int4) or
alone (fp8), and what else it has in half precision; all that is left alone is in half precision. The counts are the
graph's initializers; that a graph has just those is checked on the shapes checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from acceptance.tensorrt_report import publish
from conftest import CHECKPOINT
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, Report, graphs
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.engines import EngineOptions
from diffuserve_export.export import plan_export
from diffuserve_export.modules import UNet
from diffuserve_export.quantize import QuantizeOptions
from diffuserve_export.quantize.layers import FLOAT8, INT4, INT4_BLOCK, INT8
from diffuserve_export.quantize.recipes import RECIPES, Layer, Recipe, choose_layers, recipe_of
from diffuserve_export.sources import open_architecture, open_checkpoint
from measure.tables import table
from unit.export.conftest import without_logs

HALF: Final = 2
BITS: Final = {INT8: 8, FLOAT8: 8, INT4: 4}
LINEAR_ONLY: Final = Recipe(RECIPES["int4"].linear, None, {})
KINDS: Final = {
    "int8": RECIPES["int8"],
    "fp8": RECIPES["fp8"],
    "fp8 for `tensorrt-rtx`": recipe_of("fp8", "tensorrt-rtx"),
    "int4 linear layers alone": LINEAR_ONLY,
    "int4": RECIPES["int4"],
}


def architecture(checkpoint: Checkpoint) -> nn.Module:
    with torch.device("meta"):
        model: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(checkpoint.parts[UNET].config))
    return UNet(model)


def half_bytes(module: nn.Module) -> int:
    return HALF * sum(one.numel() for one in module.parameters())


def saved_bytes(layer: nn.Linear | nn.Conv2d, kind: Layer, smoothed: bool) -> int:
    """Of one layer in half precision, what it takes less when it is quantized."""
    weight, outputs = layer.weight.numel(), layer.weight.shape[0]
    scales = {INT8: outputs, FLOAT8: 1, INT4: weight // INT4_BLOCK}[kind.weight]
    others = scales + (kind.inputs is not None)
    if smoothed and isinstance(layer, nn.Linear):
        others += layer.in_features
    return weight * HALF - weight * BITS[kind.weight] // 8 - others * HALF


def quantized_bytes(module: nn.Module, recipe: Recipe) -> int:
    chosen, _ = choose_layers(module, recipe)
    layers = dict(module.named_modules())
    smoothed = recipe.algorithm.get("method") == "smoothquant"
    saved: Iterable[int] = (saved_bytes(layers[name], kind, smoothed) for name, kind in chosen.items())
    return half_bytes(module) - sum(saved)


def test_sizes_of_full_size_unets() -> None:
    rows, saved = [], {}
    for family in ("sd15", "sdxl"):
        module = architecture(open_architecture(family))
        whole = half_bytes(module)
        rows.append((family, "fp16", f"{whole / 1e6:.0f}", ""))
        for name, recipe in KINDS.items():
            size = quantized_bytes(module, recipe)
            saved[family, name] = 1 - size / whole
            rows.append((family, name, f"{size / 1e6:.0f}", f"{saved[family, name]:.0%}"))
    publish("quantized sizes", table(("UNet", "precision", "weights, MB", "saved"), rows))
    assert saved["sd15", "int4 linear layers alone"] < saved["sdxl", "int4 linear layers alone"]
    assert saved["sd15", "int4"] > saved["sd15", "int4 linear layers alone"]
    assert all(0 < one < 0.75 for one in saved.values())


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_a_graph_has_the_bytes_that_are_counted(precision: str, tmp_path: Path) -> None:
    plan = plan_export(
        ExportOptions(
            checkpoint=str(CHECKPOINT),
            out=tmp_path,
            target="tensorrt-rtx",
            precision=precision,
            engine=EngineOptions(compute_capability="89"),
            quantize=QuantizeOptions(pictures=0, steps=1),
        )
    )
    path = tmp_path / "models" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    with without_logs():
        graphs.graph_from_component(plan, UNET, path, Report())
    graph = onnx.load(path).graph
    found = sum(len(one.raw_data) or HALF * len(one.int32_data) for one in graph.initializer)
    expected = quantized_bytes(architecture(open_checkpoint(CHECKPOINT)), recipe_of(precision, "tensorrt-rtx"))
    assert found == pytest.approx(expected, rel=0.01)
