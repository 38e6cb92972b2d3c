"""Make everything that an export consists of in one folder. This side of the package needs torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.manifest import Component, Manifest
from diffuserve.spec import device_kind
from diffuserve_export.component_model import component_model_from_onnx
from diffuserve_export.engines.model import GpuModel, check_memory, gpu_model_from_onnx
from diffuserve_export.engines.profiles import ShapeRanges
from diffuserve_export.modules import module_of
from diffuserve_export.onnx_graph import GRAPH_FILE, onnx_from_component
from diffuserve_export.ports import Ports, ports_of
from diffuserve_export.report import Report
from diffuserve_export.tokenizer import tokenizer_from_checkpoint
from diffuserve_export.verify import TOLERANCE, check_shapes, example_inputs, example_shape, verify_onnx

if TYPE_CHECKING:
    from diffuserve_export.export import Plan

__all__ = ["assemble"]


def assemble(plan: Plan, key: str, staging: Path, report: Report) -> Manifest:
    """Write models, tokenizer and manifest of `plan` below `staging`, laid out as in a deployment."""
    ports = ports_of(plan.checkpoint)
    names = plan.checkpoint.family.components
    report.started(plan.name, len(names))
    folder = staging / "checkpoints" / plan.name
    folder.mkdir(parents=True)
    tokenizer_from_checkpoint(plan.checkpoint, folder / "tokenizer.json")
    components = {name: _component(plan, name, ports[name], staging / "models", report) for name in names}
    engines = {name: component.engine for name, component in components.items() if component.engine}
    check_memory(engines, plan.engine.memory_budget_gb)
    manifest = _manifest(plan, key, components)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _component(plan: Plan, component: str, ports: Ports, models: Path, report: Report) -> Component:
    """Checkpoint -> torch module -> ONNX -> verified -> component model."""
    checkpoint, folder = plan.checkpoint, models / f"{plan.name}_{component}"
    (folder / "1").mkdir(parents=True)
    report.stage(component, "loading")
    module = module_of(checkpoint, component)
    report.stage(component, "exporting")
    example = example_inputs(checkpoint, ports[0], example_shape(checkpoint))
    graph = onnx_from_component(module, ports, example, folder / "1" / GRAPH_FILE, plan.opset)
    report.stage(component, "verifying")
    feeds = [example_inputs(checkpoint, ports[0], sides) for sides in check_shapes(checkpoint, plan.size)]
    report.verified(verify_onnx(graph, module, component, ports, feeds, TOLERANCE[plan.precision]))
    del module  # a builder may need all the memory that there is
    return _triton_model(plan, component, ports, folder, report)


def _triton_model(plan: Plan, component: str, ports: Ports, folder: Path, report: Report) -> Component:
    """Make the Triton model of the folder's graph, for the plan's target."""
    weights = sorted((folder / "1").iterdir())
    sha256, size = _sha256(weights), sum(file.stat().st_size for file in weights)
    if device_kind([plan.target]) == "cpu":
        component_model_from_onnx(folder, ports)
        return Component(folder.name, ports[0], ports[1], sha256=sha256, bytes=size)
    report.stage(component, "building")
    ranges = ShapeRanges(plan.size, plan.rows, plan.checkpoint.latent_scale, plan.checkpoint.token_limit, {})
    model = GpuModel(plan.target, plan.precision, component, ports, ranges, plan.engine)
    engine = gpu_model_from_onnx(folder, model, report.note)
    if engine is not None:
        sha256, size = engine.sha256, engine.bytes
    return Component(folder.name, ports[0], ports[1], sha256=sha256, bytes=size, engine=engine)


def _sha256(files: list[Path]) -> str:
    """Of the files' bytes one after another: the graph, then its weights where they lie beside it."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _manifest(plan: Plan, key: str, components: dict[str, Component]) -> Manifest:
    checkpoint = plan.checkpoint
    return Manifest(
        name=plan.name,
        family=checkpoint.family.name,
        target=plan.target,
        precision=plan.precision,
        source=plan.source,
        key=key,
        size=plan.size,
        rows=plan.rows,
        latent_channels=checkpoint.latent_channels,
        latent_scale=checkpoint.latent_scale,
        guidance_scale=checkpoint.guidance_scale,
        token_limit=checkpoint.token_limit,
        scheduler=dict(checkpoint.scheduler),
        components=components,
    )
