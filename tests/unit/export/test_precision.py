"""fp16 and bf16: what is cast, what must stay in float32, and graphs whose types do not agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from onnx import TensorProto, helper
from torch import nn

from diffuserve_export import ExportError, ExportOptions, VerificationError, graphs
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.float32_copy import float32_copy
from diffuserve_export.graph_types import check_types
from diffuserve_export.graphs import Graph, graph_from_component
from diffuserve_export.modules import module_of
from diffuserve_export.ports import ports_of
from diffuserve_export.precision import Islands, cast_module, find_islands, float32_reference
from diffuserve_export.verify import check_shapes, example_inputs
from unit.export.conftest import Recorder, without_logs
from unit.export.pipelines import random_pipeline

HALF = TensorProto.FLOAT16


def small_plan(root: Path, kind: str, precision: str, opset: int = 18) -> Plan:
    """For a small checkpoint of some kind below `root`, in any precision and opset, whatever targets are built."""
    if not (root / kind).exists():
        random_pipeline(kind).save_pretrained(root / kind)
    made = plan_export(ExportOptions(checkpoint=str(root / kind), out=root))
    return replace(made, precisions=dict.fromkeys(made.precisions, precision), opset=opset)


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """Plans by kind and precision."""
    return partial(small_plan, tmp_path_factory.mktemp("precision"))


def export(plan: Plan, component: str, folder: Path, report: Recorder | None = None) -> Graph:
    (folder / component / "1").mkdir(parents=True)
    with without_logs():
        return graph_from_component(plan, component, folder / component / "1" / "model.onnx", report or Recorder())


def feeds_of(plan: Plan, component: str) -> list[list[torch.Tensor]]:
    inputs = ports_of(plan.checkpoint)[component][0]
    return [example_inputs(plan.checkpoint, inputs, sides) for sides in check_shapes(plan.checkpoint, plan.size)]


def types_of(path: Path) -> dict[str, int]:
    model = onnx.load(path)
    return {one.name: one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)}


def test_sdxls_unet_takes_one_type_but_for_times(plans: Callable[..., Plan], tmp_path: Path) -> None:
    """So do the others, in bf16 too: see tests/acceptance/test_half_precision.py."""
    report = Recorder()
    graph = export(plans("sdxl", "fp16"), "unet", tmp_path, report)
    single = TensorProto.FLOAT
    assert types_of(graph.path) == {
        "sample": HALF,
        "timestep": single,
        "encoder_hidden_states": HALF,
        "text_embeds": HALF,
        "time_ids": single,
        "model_output": HALF,
    }
    model = onnx.load(graph.path)
    assert "Attention" not in {node.op_type for node in model.graph.node}
    assert {weight.data_type for weight in model.graph.initializer if len(weight.raw_data) > 1000} == {HALF}
    assert [one.shape for one in report.results] == [(1, 4, 8, 8), (3, 4, 2, 4)]
    assert all(one.error < 1e-2 for one in report.results)


def test_a_concat_of_half_and_float_is_found(tmp_path: Path) -> None:
    """What TensorRT refuses: `text_embeds` in half beside the float32 embedding of `time_ids`."""
    first, second = helper.make_tensor_value_info("a", HALF, [2]), helper.make_tensor_value_info("b", 1, [2])
    output = helper.make_tensor_value_info("c", HALF, [4])
    node = helper.make_node("Concat", ["a", "b"], ["c"], name="joined", axis=0)
    graph = helper.make_graph([node], "g", [first, second], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    with pytest.raises(
        VerificationError, match=r"unet: (Concat joined takes a in FLOAT16 and b in FLOAT|.*contradict)"
    ):
        check_types(tmp_path / "model.onnx", "unet")


def test_types_are_followed_through_operators_without_inference(tmp_path: Path) -> None:
    """onnx infers nothing for GroupNormalization, and so nothing for what follows it."""
    sides: list[str | int | None] = ["rows", 4, "h", "w"]
    weights = [helper.make_tensor(name, HALF, [4], np.ones(4, np.float16)) for name in ("scale", "bias")]
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["n"], num_groups=2),
        helper.make_node("Sigmoid", ["n"], ["s"]),
        helper.make_node("Add", ["s", "y"], ["z"], name="sum"),
    ]
    for kind, fits in ((HALF, True), (TensorProto.FLOAT, False)):
        inputs = [helper.make_tensor_value_info("x", HALF, sides), helper.make_tensor_value_info("y", kind, sides)]
        graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("z", HALF, sides)], weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "model.onnx")
        if fits:
            check_types(tmp_path / "model.onnx", "unet")
        else:
            with pytest.raises(
                VerificationError, match="Add sum takes s in FLOAT16 and y in FLOAT, and TensorRT wants"
            ):
                check_types(tmp_path / "model.onnx", "unet")


def overflowing(module: nn.Module, name: str, factor: float = 1e6) -> None:
    """Scale the weights of a layer so that its output is far beyond fp16, where a norm follows that undoes it."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    layer.weight.data *= factor


RESNET = "model.decoder.up_blocks.0.resnets.0"


def test_an_overflow_makes_a_float32_island(
    plans: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: Any) -> nn.Module:
        module = module_of(*arguments)
        overflowing(module, f"{RESNET}.conv1")
        return module

    monkeypatch.setattr(graphs, "module_of", spoiled)
    plan, report = plans("sd15", "fp16"), Recorder()
    graph = export(plan, "vae_decoder", tmp_path, report)
    assert graph.float32 == (RESNET,)
    assert report.notes == [f"vae_decoder keeps in float32: {RESNET}"]
    assert all(one.error < 1e-2 for one in report.results)
    assert set(types_of(graph.path).values()) == {HALF}
    monkeypatch.setattr(graphs, "find_islands", lambda *_: Islands())
    with pytest.raises(
        ExportError, match=r"vae_decoder overflows in fp16, in .*convolution.*; export it in bf16 or fp32"
    ):
        export(plan, "vae_decoder", tmp_path / "without")


def test_where_islands_end(plans: Callable[..., Plan]) -> None:
    plan = plans("sd15", "fp16")
    module, feeds = module_of(plan.checkpoint, "vae_decoder"), feeds_of(plan, "vae_decoder")
    assert find_islands(module, feeds, "fp16") == Islands()
    overflowing(module, f"{RESNET}.conv1")
    assert find_islands(module, feeds, "fp16") == Islands((RESNET,))
    assert find_islands(module, feeds, "bf16") == Islands()
    # A residual that no norm undoes goes through the whole decoder, and out of it.
    overflowing(module, f"{RESNET}.conv2")
    assert find_islands(module, feeds, "fp16").modules == ("model.decoder",)
    overflowing(module, "model.decoder.conv_out")
    islands = find_islands(module, feeds, "fp16")
    assert islands.whole
    assert cast_module(module, "fp16", islands) == []
    overflowing(module, "model.decoder.conv_in", float("inf"))
    with pytest.raises(ExportError, match=r"gives values that are not finite, in float32 too"):
        find_islands(module, feeds, "fp16")


def test_a_component_that_overflows_everywhere_is_exported_in_float32(
    plans: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "find_islands", lambda *_: Islands(("",)))
    report = Recorder()
    graph = export(plans("sd15", "fp16"), "vae_decoder", tmp_path, report)
    assert (graph.precision, graph.float32) == ("fp32", ())
    assert {port.datatype for port in (*graph.ports[0], *graph.ports[1])} == {"FP32"}
    assert report.notes == ["vae_decoder stays in float32: its activations go beyond what fp16 can hold"]


def test_attention_scores_are_watched(plans: Callable[..., Plan]) -> None:
    plan = plans("sd15", "fp16")
    module, feeds = module_of(plan.checkpoint, "unet"), feeds_of(plan, "unet")
    name = "model.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    attention = module.get_submodule(name)
    assert isinstance(attention, Attention)
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data *= 2000 / float(layer.weight.norm())
    assert find_islands(module, feeds, "fp16") == Islands((), (name,))


def test_upcast_attention_is_honoured(plans: Callable[..., Plan], tmp_path: Path) -> None:
    """SD2.1's config asks for attention scores in float32; projections stay in half."""
    plan = plans("sd21", "fp16")
    module = module_of(plan.checkpoint, "unet")
    attentions = [name for name, one in module.named_modules() if isinstance(one, Attention)]
    islands = find_islands(module, feeds_of(plan, "unet"), "fp16")
    assert islands == Islands((), tuple(sorted(attentions)))
    graph = export(plan, "unet", tmp_path)
    assert graph.float32 == tuple(f"{name}.scores" for name in sorted(attentions))
    model = onnx.shape_inference.infer_shapes(onnx.load(graph.path))
    types = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    softmax = [types[node.output[0]] for node in model.graph.node if node.op_type == "Softmax"]
    assert softmax == [TensorProto.FLOAT] * len(attentions)


def test_the_processor_for_scores_is_diffusers_own_attention(plans: Callable[..., Plan]) -> None:
    """Also in the autoencoder, whose attention has pictures, a norm and a residual."""
    for component in ("unet", "vae_decoder"):
        plan = plans("sd15", "bf16")
        module = module_of(plan.checkpoint, component)
        feed = feeds_of(plan, component)[-1]
        want = module(*feed)
        names = tuple(name for name, one in module.named_modules() if isinstance(one, Attention))
        assert names
        handles = cast_module(module, "bf16", Islands((), names))
        float32_reference(module, handles)
        error = (module(*feed) - want).abs().max() / want.abs().max()
        assert error < 0.05  # the rounded weights


def test_the_reference_has_the_rounded_weights(plans: Callable[..., Plan]) -> None:
    plan = plans("sd15", "fp16")
    module = module_of(plan.checkpoint, "vae_decoder")
    kept = {name: one.clone() for name, one in module.state_dict().items()}
    handles = cast_module(module, "fp16", Islands((RESNET,)))
    assert module.get_submodule(f"{RESNET}.conv1").weight.dtype == torch.float32
    assert module.get_submodule("model.decoder.conv_in").weight.dtype == torch.float16
    for name, one in float32_reference(module, handles).state_dict().items():
        assert one.dtype == torch.float32
        assert torch.equal(one, kept[name] if name.startswith(RESNET) else kept[name].half().float())


def test_a_float32_copy_has_no_bf16(plans: Callable[..., Plan], tmp_path: Path) -> None:
    graph = export(plans("sd15", "bf16"), "text_encoder", tmp_path)
    copy = float32_copy(graph.path, tmp_path / "copy.onnx")
    assert TensorProto.BFLOAT16 in types_of(graph.path).values()
    assert set(types_of(copy).values()) == {TensorProto.INT32, TensorProto.FLOAT}
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(graph.path).graph.initializer}
    for one in onnx.load(copy).graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(one), weights[one.name].astype(np.float32))
