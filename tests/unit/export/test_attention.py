"""Attention with its scores in parts, or in float32, is diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from diffuserve.manifest import TensorShape
from diffuserve_export.attention import float32_scores, score_in_parts
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.ports import Ports
from unit.export.conftest import without_logs

SHAPE = ("rows", 16, "height", "width")


def attention() -> Attention:
    """The autoencoder's: one head, a norm before and a residual around it."""
    torch.manual_seed(4)
    return Attention(16, heads=1, dim_head=16, norm_num_groups=4, residual_connection=True, bias=True).eval()


def pixels(height: int, width: int) -> Tensor:
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("multiple", "parts"), [(64, 8), (4, 4), (36, 4), (1, 1)])
@torch.no_grad()
def test_parts_give_the_same(multiple: int, parts: int) -> None:
    whole, split = attention(), attention()
    score_in_parts(split, multiple)
    processor: Any = split.processor
    assert processor.parts == parts
    for height, width in ((8, 8), (6, 12), (12, 2)):
        if height * width % multiple == 0:
            assert torch.allclose(split(pixels(height, width)), whole(pixels(height, width)), atol=1e-6)


@torch.no_grad()
def test_scores_in_float32_stay_in_parts() -> None:
    module = attention()
    score_in_parts(module, 8)
    float32_scores(module)
    processor: Any = module.processor
    assert (processor.float32, processor.parts) == (True, 8)
    want, got = attention()(pixels(8, 8)), module.bfloat16()(pixels(8, 8).bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() / want.abs().max() < 0.02


def test_a_graph_never_has_all_scores(tmp_path: Path) -> None:
    """Sides are free, and no product has more queries than a part has."""
    module = attention().requires_grad_(False)
    score_in_parts(module, 8)
    ports: Ports = ((TensorShape("pixels", "FP32", SHAPE),), (TensorShape("output", "FP32", SHAPE),))
    with without_logs():
        path = onnx_from_component(module, ports, [pixels(8, 12)], tmp_path / "model.onnx", 18)
    model = onnx.load(path)
    scores = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in scores)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(scores, {"pixels": pixels(16, 8).numpy()})
    assert [one.shape for one in found] == [(2, 1, 16, 128)] * 8
