"""Make everything that an export consists of in one folder. torch works elsewhere: see graph_process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.manifest import Component, Conditioning, Encoder, Manifest
from diffuserve.spec import device_kind
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.component_model import GRAPH_FILE, component_model_from_onnx
from diffuserve_export.engines.build import onnx_files, sha256_of
from diffuserve_export.engines.model import GpuModel, check_memory, gpu_model_from_onnx
from diffuserve_export.engines.profiles import ShapeRanges
from diffuserve_export.graph_process import graph_from_component
from diffuserve_export.report import Report
from diffuserve_export.tokenizer import tokenizer_file, tokenizer_from_checkpoint

if TYPE_CHECKING:
    from diffuserve_export.export import Plan
    from diffuserve_export.graphs import Graph

__all__ = ["assemble"]


def assemble(plan: Plan, key: str, staging: Path, report: Report) -> Manifest:
    """Write models, tokenizers and manifest of `plan` below `staging`, laid out as in a deployment."""
    names = plan.checkpoint.family.components
    report.started(plan.name, len(names))
    folder = staging / "checkpoints" / plan.name
    folder.mkdir(parents=True)
    for encoder in plan.checkpoint.family.encoders:
        tokenizer_from_checkpoint(plan.checkpoint, encoder, folder / tokenizer_file(encoder))
    components = {name: _component(plan, name, staging / "models", report) for name in names}
    engines = {name: component.engine for name, component in components.items() if component.engine}
    check_memory(engines, plan.engine.memory_budget_gb)
    manifest = _manifest(plan, key, components)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _component(plan: Plan, component: str, models: Path, report: Report) -> Component:
    """Checkpoint -> verified graph -> component model."""
    folder = models / f"{plan.name}_{component}"
    (folder / "1").mkdir(parents=True)
    graph = graph_from_component(plan, component, folder / "1" / GRAPH_FILE, report)
    return _triton_model(plan, component, graph, folder, report)


def _triton_model(plan: Plan, component: str, graph: Graph, folder: Path, report: Report) -> Component:
    """Make the Triton model of the folder's graph, for the plan's target."""
    engine = None
    if device_kind([plan.target]) == "cpu":
        component_model_from_onnx(folder, graph.ports)
    else:
        report.stage(component, "building")
        ranges = ShapeRanges(plan.size, plan.rows, plan.checkpoint.latent_scale, plan.checkpoint.token_limit, {})
        model = GpuModel(plan.target, graph.precision, component, graph.ports, ranges, plan.engine)
        engine = gpu_model_from_onnx(folder, model, report.note)
    sha256, size = (engine.sha256, engine.bytes) if engine else _hash_and_bytes(onnx_files(graph.path))
    inputs, outputs = graph.ports
    return Component(
        folder.name, inputs, outputs, sha256, size, engine, graph.precision, graph.float32, graph.quantization
    )


def _hash_and_bytes(files: list[Path]) -> tuple[str, int]:
    return sha256_of(files), sum(file.stat().st_size for file in files)


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
        conditioning=_conditioning(checkpoint),
        steps=checkpoint.steps,
    )


def _conditioning(checkpoint: Checkpoint) -> Conditioning:
    family = checkpoint.family

    def encoder(name: str, key: str) -> Encoder:
        vocabulary = int(checkpoint.parts[name].config["vocab_size"])
        return Encoder(name, tokenizer_file(name), vocabulary, key)

    return Conditioning(
        encoders=tuple(map(encoder, family.encoders, family.embedding_keys)),
        text_embeds=family.text_embeds or None,
        time_ids=family.time_ids,
        zero_empty_negative=checkpoint.zero_empty_negative,
        sample=family.sample,
        guidance_embedding=checkpoint.guidance_embedding,
        clip_skip=checkpoint.clip_skip,
    )
