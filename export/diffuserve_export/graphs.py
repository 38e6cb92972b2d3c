"""Checkpoint -> verified ONNX graphs, one component after another, so that one is in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffuserve.lora.layout import LoraLayout
from diffuserve.manifest import LatentColours, Quantization
from diffuserve.spec import UNET, VAE_DECODER, device_kind
from diffuserve_export.attention import score_in_parts
from diffuserve_export.checkpoint import part_of
from diffuserve_export.colours import colours_of
from diffuserve_export.graph_types import check_types
from diffuserve_export.lora import add_lora, lora_layout
from diffuserve_export.modules import module_of
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.options import QUANTIZED
from diffuserve_export.ports import Ports, ports_of, with_lora
from diffuserve_export.precision import DTYPES, Islands, cast_module, find_islands, float32_reference, within_half
from diffuserve_export.quantize.layers import QUANTIZED_OPSET
from diffuserve_export.quantize.unet import quantized_unet
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

__all__ = ["Graph", "graph_from_component", "layout_for"]


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX file, weights beside it where they are large, that was found to compute what torch does.

    `precision` is what it computes in, but for the modules named in `float32`; `quantization` says where a quantized
    one does. `ports` are in that precision too, or in half. `colours` are of the autoencoder's decoder. `lora` is of a
    component that takes adapters.
    """

    path: Path
    ports: Ports
    precision: str
    float32: tuple[str, ...]
    quantization: Quantization | None = None
    colours: LatentColours | None = None
    lora: LoraLayout | None = None


def graph_from_component(plan: Plan, component: str, path: Path, report: Report) -> Graph:
    """Write the graph of `component` to `path`: load, calibrate, quantize, cast, export, check types, verify, judge.

    Raises CheckpointError, ExportError, VerificationError or QualityError.
    """
    checkpoint, wanted = plan.checkpoint, plan.precisions[component]
    shapes = check_shapes(checkpoint, plan.size)
    report.stage(component, "loading")
    module = module_of(checkpoint, component)
    colours = colours_of(module, checkpoint.latent_scale) if component == VAE_DECODER else None
    on_device = device_kind([plan.target]) != "cpu"
    if on_device and part_of(component) == "vae":
        score_in_parts(module, checkpoint.latents_multiple)
    plain = [example_inputs(checkpoint, ports_of(checkpoint)[component][0], sides) for sides in shapes]
    whole = "fp16" if wanted in QUANTIZED else wanted
    islands = _islands(module, component, plain, whole, report)
    precision = "fp32" if islands.whole else whole
    ports = ports_of(checkpoint, {component: precision})[component]
    lora = layout_for(plan, module, component, precision)
    quantized = quantized_unet(plan, module, islands.modules, report) if wanted in QUANTIZED else None
    module = quantized.module if quantized else module
    if lora:
        add_lora(module, lora)
        ports = with_lora(ports, lora.size)
    handles = cast_module(module, precision, islands)
    report.stage(component, "exporting")
    example = example_inputs(checkpoint, ports[0], example_shape(checkpoint))
    onnx_from_component(module, ports, example, path, QUANTIZED_OPSET if quantized else plan.opset)
    check_types(path, component)
    report.stage(component, "verifying")
    feeds = [example_inputs(checkpoint, ports[0], sides) for sides in shapes]
    float32_reference(module, handles)
    with within_half(module, component, islands) if precision == "fp16" else nullcontext():
        expected = reference_outputs(module, feeds)
    verdict = quantized.verdict if quantized else None
    del module, handles, quantized
    gc.collect()  # modules and their hooks hold each other, and the graph's session needs the memory
    tolerance = TOLERANCE[wanted if verdict else precision]
    report.verified(verify_onnx(path, component, ports, feeds, expected, tolerance, optimized=not on_device))
    names = islands.names if precision != "fp32" else ()
    if verdict is None:
        return Graph(path, ports, precision, names, colours=colours, lora=lora)
    return Graph(path, ports, wanted, names, verdict(path, ports, report), lora=lora)


def layout_for(plan: Plan, module: nn.Module, component: str, precision: str) -> LoraLayout | None:
    """Of the adapters that `module` is to take, in that precision; None where it takes none."""
    if not plan.lora_rank or component not in (UNET, *plan.checkpoint.family.encoders):
        return None
    return lora_layout(module, plan.lora_rank, plan.rows.max, DTYPES[precision].itemsize)


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
