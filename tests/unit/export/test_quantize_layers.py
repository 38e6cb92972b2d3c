"""Quantized layers: their numbers, which layers they take the place of, and the operators that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from diffuserve.manifest import TensorShape
from diffuserve_export.graph_types import check_types
from diffuserve_export.modules import UNet
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.ports import Ports
from diffuserve_export.precision import Islands, cast_module, float32_reference
from diffuserve_export.quantize.calibrate import calibrated_layers, replace_layers
from diffuserve_export.quantize.layers import FLOAT8, INT4, INT4_BLOCK, INT8, QUANTIZED_OPSET, rounded
from diffuserve_export.quantize.recipes import LEFT_ALONE, RECIPES, Layer, Recipe, choose_layers, recipe_of
from unit.export.conftest import without_logs
from unit.export.pipelines import random_pipeline

WIDTH = 128
OPERATORS = {"QuantizeLinear", "DequantizeLinear"}
PORTS: Ports = (
    (TensorShape("value", "FP16", ("rows", 64, "height", "width")),),
    (TensorShape("output", "FP16", ("rows", "tokens", 96)),),
)


class Small(nn.Module):
    """A convolution and a linear layer behind it, one channel of whose inputs is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = nn.Conv2d(64, WIDTH, 3, stride=2, padding=1)
        self.linear = nn.Linear(WIDTH, 96)
        self.register_buffer("gains", torch.ones(WIDTH).index_fill(0, torch.tensor([5]), 40.0))

    def forward(self, value: Tensor) -> Tensor:
        channels = self.convolution(value).flatten(2).transpose(1, 2) * self.gains
        output: Tensor = self.linear(channels)
        return output


def example(seed: int = 1) -> Tensor:
    return torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(recipe: Recipe) -> tuple[Small, dict[str, nn.Module]]:
    """With scales found on the example."""
    used = Small()
    chosen, left = choose_layers(used, recipe)
    assert set(chosen) == {"convolution", "linear"}
    assert not left
    layers = calibrated_layers(used, recipe, chosen, lambda module: module(example()))
    module = Small().eval().requires_grad_(False)
    replace_layers(module, layers)
    return module, layers


@pytest.mark.parametrize(
    ("number", "given", "expected"),
    [
        (INT8, [0.5, 1.5, -2.5, 126.6, 300.0, -300.0], [0, 2, -2, 127, 127, -128]),
        (INT4, [0.49, -8.7, 7.6, 3.5], [0, -8, 7, 4]),
        (FLOAT8, [1.0, 17.0, 1e4, -1e4, 0.0019], [1.0, 16.0, 448.0, -448.0, 0.001953125]),
    ],
)
def test_numbers_are_rounded_to_the_nearest_and_clipped(number: Any, given: list[float], expected: list[float]) -> None:
    assert rounded(torch.tensor(given), number).float().tolist() == expected


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.02), ("fp8", 0.06), ("int4", 0.12)])
def test_quantized_layers_compute_about_the_same(precision: str, error: float) -> None:
    module, layers = quantized(RECIPES[precision])
    with torch.no_grad():
        want, got = Small()(example()), module(example())
    assert 1e-4 < (got - want).norm() / want.norm() < error
    stored: Any = layers["linear"].weight
    assert stored.shape == (WIDTH, 96)
    assert stored.dtype == (torch.float8_e4m3fn if precision == "fp8" else torch.int8)


def test_smoothing_moves_a_large_channel_into_the_weights() -> None:
    _, layers = quantized(RECIPES["int8"])
    smoothing: Any = layers["linear"].smoothing
    assert int(smoothing.argmin()) == 5
    assert layers["convolution"].smoothing is None


def test_scales_are_what_half_precision_holds() -> None:
    module, _ = quantized(RECIPES["int8"])
    for name, buffer in module.named_buffers():
        if name.endswith("scale"):
            assert torch.equal(buffer.half().float(), buffer)
            assert (buffer > 0).all()


def test_a_channel_of_zeros_stays_zeros() -> None:
    used = Small()
    with torch.no_grad():
        used.linear.weight[3] = 0
    layers = calibrated_layers(used, RECIPES["int8"], {"linear": RECIPES["int8"].linear}, lambda one: one(example()))
    weight: Any = layers["linear"].weight
    assert weight[:, 3].abs().max() == 0


@pytest.fixture(scope="module", params=["int8", "fp8", "int4"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    """The precision, a quantized module with other layers' weights as in half precision, and its graph."""
    module, _ = quantized(RECIPES[request.param])
    handles = cast_module(module, "fp16", Islands())
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    with without_logs():
        onnx_from_component(module, PORTS, (example().half(),), path, QUANTIZED_OPSET)
    return request.param, float32_reference(module, handles), path


def test_the_graph_computes_what_the_layers_do(exported: tuple[str, nn.Module, Path]) -> None:
    precision, module, path = exported
    check_types(path, precision)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    value = torch.randn(3, 64, 12, 4, generator=torch.Generator().manual_seed(2)).half()
    (got,) = session.run(None, {"value": value.numpy()})
    with torch.no_grad():
        want = module(value.float()).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_weights_are_stored_in_their_own_type(exported: tuple[str, nn.Module, Path]) -> None:
    precision, _, path = exported
    model = onnx.load(path)
    weights = {one.name: one for one in model.graph.initializer}
    types = onnx.TensorProto
    kinds = {"int8": types.INT8, "fp8": types.FLOAT8E4M3FN, "int4": types.INT4}
    linear, convolution = weights["linear.weight"], weights["convolution.weight"]
    assert linear.data_type == kinds[precision]
    assert convolution.data_type == kinds["int8" if precision == "int4" else precision]
    assert len(linear.raw_data) == WIDTH * 96 // (2 if precision == "int4" else 1)
    scale = weights["linear.weight_scale"]
    shapes = {"int8": [96], "fp8": [], "int4": [WIDTH // INT4_BLOCK, 96]}
    assert (scale.data_type, list(scale.dims)) == (types.FLOAT16, shapes[precision])


def test_inputs_are_quantized_where_the_recipe_says(exported: tuple[str, nn.Module, Path]) -> None:
    precision, _, path = exported
    nodes = [node.op_type for node in onnx.load(path).graph.node if node.op_type in OPERATORS]
    pairs = 1 if precision == "int4" else 2
    assert nodes.count("QuantizeLinear") == pairs
    assert nodes.count("DequantizeLinear") == pairs + 2


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(random_pipeline("sdxl").unet)


def test_sensitive_layers_are_left_alone(unet: UNet) -> None:
    chosen, left = choose_layers(unet, RECIPES["int8"])
    both = {name for name, one in unet.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))}
    assert chosen.keys() | left.keys() == both
    assert not chosen.keys() & left.keys()
    for part in LEFT_ALONE:
        found = {name for name in both if part in name.split(".")}
        assert found
        assert found <= left.keys()
    assert {"to_q", "to_k", "to_v", "0", "conv1", "conv2", "conv"} <= {name.split(".")[-1] for name in chosen}


def test_what_needs_float32_is_left_alone(unet: UNet) -> None:
    chosen, left = choose_layers(unet, RECIPES["int8"], ["model.down_blocks.1"])
    assert not [name for name in chosen if name.startswith("model.down_blocks.1.")]
    assert left["model.down_blocks.1.resnets.0.conv1"] == "needs float32"
    assert choose_layers(unet, RECIPES["int8"], [""])[0] == {}


def test_four_bits_are_for_linear_layers_that_blocks_fit(unet: UNet) -> None:
    chosen, left = choose_layers(unet, RECIPES["int4"])
    four = {name for name, layer in chosen.items() if layer.weight is INT4}
    assert {unet.get_submodule(name).in_features for name in four} == {INT4_BLOCK}
    assert {name.split(".")[-1] for name in chosen.keys() - four} == {"conv1", "conv2", "conv"}
    assert left["model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == "its width is no multiple of 64"


def test_tensorrt_rtx_has_no_fp8_convolutions() -> None:
    assert recipe_of("fp8", "tensorrt").convolution == Layer(FLOAT8, FLOAT8)
    assert recipe_of("fp8", "tensorrt-rtx").convolution is None
    assert recipe_of("int8", "tensorrt-rtx") == RECIPES["int8"]
