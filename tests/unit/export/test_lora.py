"""Components that take LoRA adapters: each row its own, as if its factors were added to the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from diffuserve.engine_files import read_facts
from diffuserve.lora import LoraLayout
from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.profiles import Range
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, OptionError
from diffuserve_export.engines import EngineOptions, EngineRequest, engine_from_onnx
from diffuserve_export.engines.device import builder_version
from diffuserve_export.engines.profiles import ShapeRanges, engine_profiles
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.graphs import Graph, graph_from_component, layout_for
from diffuserve_export.lora import MOST_BYTES, add_lora, lora_layout, most_adapters
from diffuserve_export.modules import module_of
from diffuserve_export.ports import ports_of, with_lora
from diffuserve_export.verify import TOLERANCE, check_shapes, example_inputs, open_graph, reference_outputs
from unit.export.conftest import Recorder, without_logs
from unit.export.pipelines import random_pipeline

RANK = 3
PARTS = [("sd15", "text_encoder"), ("sd15", UNET), ("sdxl", "text_encoder_2"), ("sdxl", UNET)]


@pytest.fixture(scope="session")
def lora_plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    root = tmp_path_factory.mktemp("lora")

    def plan(kind: str, **changed: Any) -> Plan:
        if not (root / kind).exists():
            random_pipeline(kind).save_pretrained(root / kind)
        return plan_export(ExportOptions(checkpoint=str(root / kind), out=root, **{"lora_rank": RANK, **changed}))

    return plan


def wrapped(plan: Plan, component: str) -> tuple[nn.Module, nn.Module, LoraLayout]:
    """A component without adapters and with them."""
    plain = module_of(plan.checkpoint, component)
    module = copy.deepcopy(plain)
    layout = lora_layout(module, RANK, rows=8, number_bytes=4)
    add_lora(module, layout)
    return plain, module, layout


def merged(plain: nn.Module, layout: LoraLayout, adapter: Tensor) -> nn.Module:
    """The component with an adapter's products added to its weights, as LoRA is defined."""
    copied = copy.deepcopy(plain)
    layers: dict[str, Any] = {
        name.removeprefix("model.").removeprefix("text_model."): layer for name, layer in copied.named_modules()
    }
    for path, factors in layout.factors(adapter).items():
        layer = layers[path.removeprefix("text_model.")]
        layer.weight.data += (factors.up @ factors.down).reshape(layer.weight.shape)
    return copied


@pytest.mark.parametrize(("kind", "component"), PARTS)
def test_each_row_has_its_own_adapter(lora_plans: Callable[..., Plan], kind: str, component: str) -> None:
    plan = lora_plans(kind)
    plain, module, layout = wrapped(plan, component)
    sides = check_shapes(plan.checkpoint, plan.size)[1]
    feed = example_inputs(plan.checkpoint, with_lora(ports_of(plan.checkpoint)[component], layout.size)[0], sides)
    *others, lora, index = feed
    assert index.tolist() == [3, 0, 1]
    assert not lora[0].any()
    (together,) = reference_outputs(module, [feed])
    expected = {adapter: reference_outputs(merged(plain, layout, lora[adapter]), [others])[0] for adapter in range(4)}
    for row, adapter in enumerate(index.tolist()):
        for got, want in zip(together, expected[adapter], strict=True):
            assert torch.allclose(got[row], want[row], atol=1e-5)
    # The last row of a text encoder leaves out all layers.
    moved = [float((expected[3][0] - expected[0][0])[row].abs().max()) for row in range(2)]
    assert min(moved) > 10 * TOLERANCE["fp32"] * float(expected[0][0].abs().max()), "no check could see an adapter"


def test_adapters_change_what_trainers_train(lora_plans: Callable[..., Plan]) -> None:
    """kohya's: every linear layer and 1x1 convolution below these classes; diffusers' are among them."""
    pipeline = random_pipeline("sd15")
    for component, model, classes in (
        (UNET, pipeline.unet, ("Transformer2DModel",)),
        ("text_encoder", pipeline.text_encoder, ("CLIPAttention", "CLIPMLP")),
    ):
        expected = {
            f"{outer}.{inner}"
            for outer, block in model.named_modules()
            if type(block).__name__ in classes
            for inner, layer in block.named_modules()
            if type(layer).__name__ == "Linear" or getattr(layer, "kernel_size", ()) == (1, 1)
        }
        layout = lora_layout(module_of(lora_plans("sd15").checkpoint, component), RANK, 8, 4)
        found = {one.path.removeprefix("text_model.") for one in layout.targets}
        assert found == {name.removeprefix("text_model.") for name in expected}
        assert all(one.path.startswith("text_model.") for one in layout.targets) == (component != UNET)


def test_queries_keys_and_values_of_the_same_tensor_lie_side_by_side(lora_plans: Callable[..., Plan]) -> None:
    layout = lora_layout(module_of(lora_plans("sd15").checkpoint, UNET), RANK, 8, 4)
    downs = {one.path.rpartition("transformer_blocks.0.")[2]: one for one in layout.targets[:10]}
    width = downs["attn1.to_q"].in_features
    assert downs["attn1.to_k"].down - downs["attn1.to_q"].down == RANK * width
    assert downs["attn1.to_v"].down - downs["attn1.to_k"].down == RANK * width
    assert downs["attn2.to_q"].up == downs["attn2.to_q"].down + RANK * width
    assert downs["attn2.to_v"].down - downs["attn2.to_k"].down == RANK * downs["attn2.to_k"].in_features


def export(plan: Plan, component: str, folder: Path) -> tuple[Graph, Recorder]:
    (folder / component / "1").mkdir(parents=True)
    report = Recorder()
    with without_logs():
        graph = graph_from_component(plan, component, folder / component / "1" / "model.onnx", report)
    return graph, report


@pytest.fixture(scope="module")
def half(lora_plans: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A UNet's graph for TensorRT-RTX, in half precision."""
    plan = lora_plans("sd15", target="tensorrt-rtx", precision="fp16", engine=EngineOptions(compute_capability="89"))
    graph, report = export(plan, UNET, tmp_path_factory.mktemp("half"))
    assert [one.shape[0] for one in report.results] == [1, 3]
    return graph


def test_a_graph_takes_any_number_of_adapters(half: Graph) -> None:
    layout = half.lora
    assert layout is not None
    assert (layout.rank, layout.adapters) == (RANK, 65)
    types = {one.name: one.type.tensor_type.elem_type for one in onnx.load(half.path).graph.input}
    assert (types[LORA], types[LORA_INDEX]) == (TensorProto.FLOAT16, TensorProto.INT64)
    assert {one.name: one.shape for one in half.ports[0]}[LORA] == ("adapters", layout.size)
    session = open_graph(half.path, optimized=True)
    rng = np.random.default_rng(0)
    feed = {
        "sample": rng.standard_normal((4, 4, 8, 8)).astype(np.float16),
        "timestep": np.array([999, 500, 20, 1], np.float32),
        "encoder_hidden_states": rng.standard_normal((4, 77, 16)).astype(np.float16),
    }
    lora = (rng.standard_normal((9, layout.size)) * 0.1).astype(np.float16)
    lora[0] = 0

    def run(adapters: np.ndarray[Any, Any], *index: int) -> np.ndarray[Any, Any]:
        output: np.ndarray[Any, Any]
        (output,) = session.run(None, {**feed, LORA: adapters, LORA_INDEX: np.array(index, np.int64)})
        return output.astype(np.float32)

    none = run(lora[:1], 0, 0, 0, 0)
    mixed = run(lora, 0, 8, 0, 2)
    np.testing.assert_array_equal(mixed[[0, 2]], none[[0, 2]])
    assert all(np.abs(mixed[row] - none[row]).max() > 0.02 for row in (1, 3))
    alone = run(lora[[0, 8, 2]], 0, 1, 0, 2)
    np.testing.assert_array_equal(alone, mixed)


def test_an_engine_is_built_for_it(half: Graph, tmp_path: Path) -> None:
    assert half.lora is not None
    ranges = ShapeRanges(Range(16, 16, 32, 4), Range(1, 4, 8), 2, 77, {"adapters": Range(1, 2, half.lora.adapters)})
    request = EngineRequest(
        target="tensorrt-rtx",
        version=builder_version("tensorrt-rtx"),
        precision="fp16",
        inputs=half.ports[0],
        profiles=engine_profiles(UNET, half.ports[0], ranges),
        capabilities=("8.9",),
        device="any",
    )
    (profile,) = read_facts(engine_from_onnx(half.path, request, tmp_path, lambda _: None)).profiles
    assert profile.takes({"rows": 8, "adapters": 65})
    assert not profile.takes({"rows": 8, "adapters": 66})


def test_only_unet_and_text_encoders_take_adapters(lora_plans: Callable[..., Plan]) -> None:
    plan = lora_plans("sdxl")
    for component in plan.checkpoint.components:
        layout = layout_for(plan, module_of(plan.checkpoint, component), component, "fp16")
        assert (layout is None) == component.startswith("vae")


def test_the_rank_is_part_of_what_an_export_is_known_by(lora_plans: Callable[..., Plan]) -> None:
    without, some, more = (lora_plans("sd15", lora_rank=rank).facts() for rank in (0, 3, 4))
    assert "lora_rank" not in without
    assert without != some != more


@pytest.mark.parametrize(
    ("rows", "adapter_bytes", "expected"), [(64, 1000, 65), (1, 1000, 2), (64, MOST_BYTES // 5, 5), (4, MOST_BYTES, 2)]
)
def test_adapters_of_a_call_are_bounded_by_rows_and_bytes(rows: int, adapter_bytes: int, expected: int) -> None:
    assert most_adapters(rows, adapter_bytes) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, r"lora-rank is -1, and must be 1 to 128, or 0"),
        ({"lora_rank": 129}, r"lora-rank is 129"),
        (
            {"lora_rank": 8, "target": "tensorrt", "engine": EngineOptions(cuda_graphs=True)},
            r"leave out cuda-graphs or lora-rank",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExportOptions(checkpoint="x", out=Path("unused"), **options)
