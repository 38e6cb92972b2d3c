"""Checkpoint -> verified ONNX graphs, one component after another, so that one is in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffuserve_export.errors import ExportError
from diffuserve_export.graph_types import check_types
from diffuserve_export.modules import module_of
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.ports import Ports, ports_of
from diffuserve_export.precision import Islands, cast_module, find_islands, float32_reference
from diffuserve_export.report import Report
from diffuserve_export.verify import (
    TOLERANCE,
    check_shapes,
    example_inputs,
    example_shape,
    reference_outputs,
    verify_onnx,
)

if TYPE_CHECKING:
    from diffuserve_export.export import Plan

__all__ = ["Graph", "graph_from_component"]


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX file, weights beside it where they are large, that was found to compute what torch does.

    `precision` is what it computes in, but for the modules named in `float32`. `ports` are in that precision too.
    """

    path: Path
    ports: Ports
    precision: str
    float32: tuple[str, ...]


def graph_from_component(plan: Plan, component: str, path: Path, report: Report) -> Graph:
    """Write the graph of `component` to `path`: load, calibrate, cast, export, check types, verify.

    Raises CheckpointError, ExportError or VerificationError.
    """
    checkpoint, wanted = plan.checkpoint, plan.precisions[component]
    shapes = check_shapes(checkpoint, plan.size)
    report.stage(component, "loading")
    module = module_of(checkpoint, component)
    plain = [example_inputs(checkpoint, ports_of(checkpoint)[component][0], sides) for sides in shapes]
    islands = _islands(module, component, plain, wanted, report)
    precision = "fp32" if islands.whole else wanted
    handles = cast_module(module, precision, islands)
    ports = ports_of(checkpoint, {component: precision})[component]
    report.stage(component, "exporting")
    example = example_inputs(checkpoint, ports[0], example_shape(checkpoint))
    onnx_from_component(module, ports, example, path, plan.opset)
    check_types(path, component)
    report.stage(component, "verifying")
    feeds = [example_inputs(checkpoint, ports[0], sides) for sides in shapes]
    if precision == "fp16":
        _check_range(module, component, feeds[-1])
    expected = _reference(module, handles, feeds)
    del module, handles
    gc.collect()  # modules and their hooks hold each other, and the graph's session needs the memory
    report.verified(verify_onnx(path, component, ports, feeds, expected, TOLERANCE[precision]))
    return Graph(path, ports, precision, islands.names if precision != "fp32" else ())


def _islands(
    module: nn.Module, component: str, feeds: Sequence[Sequence[Tensor]], precision: str, report: Report
) -> Islands:
    if precision == "fp16":
        report.stage(component, "calibrating")
    islands = find_islands(module, feeds, precision)
    if islands.whole:
        report.note(f"{component} stays in float32: its activations go beyond what fp16 can hold")
    elif islands.modules:
        report.note(f"{component} keeps in float32: {', '.join(islands.modules)}")
    return islands


def _check_range(module: nn.Module, component: str, feed: Sequence[Tensor]) -> None:
    """ONNX Runtime computes fp16 graphs in float32 on a CPU, so only torch shows here what overflows."""
    with torch.no_grad():
        output = module(*feed)
    for tensor in output if isinstance(output, tuple) else (output,):
        if not bool(tensor.isfinite().all()):
            raise ExportError(f"{component} overflows in fp16; export it in bf16 or fp32")


def _reference(module: nn.Module, handles: Sequence[Any], feeds: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return reference_outputs(float32_reference(module, handles), feeds)
