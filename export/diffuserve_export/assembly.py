"""Make everything that an export consists of in one folder. torch works elsewhere: see graph_process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.manifest import Component, Conditioning, Encoder, LatentColours, Manifest, Range
from diffuserve.spec import PREVIEW_DECODER, VAE_COMPONENTS, VAE_DECODER, device_kind
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.component_model import GRAPH_FILE, component_model_from_onnx
from diffuserve_export.engines.build import onnx_files, sha256_of
from diffuserve_export.engines.model import GpuModel, check_memory, gpu_model_from_onnx
from diffuserve_export.engines.profiles import ShapeRanges
from diffuserve_export.graph_process import graph_from_component
from diffuserve_export.report import Report
from diffuserve_export.tokenizer import tokenizer_file, tokenizer_from_checkpoint
from diffuserve_export.workspace import model_name

if TYPE_CHECKING:
    from diffuserve_export.export import Plan
    from diffuserve_export.graphs import Graph

__all__ = ["assemble"]


def assemble(plan: Plan, key: str, staging: Path, report: Report) -> Manifest:
    """Write models, tokenizers and manifest of `plan` below `staging`, laid out as in a deployment."""
    names = plan.checkpoint.components
    report.started(plan.name, len(names))
    folder = staging / "checkpoints" / plan.name
    folder.mkdir(parents=True)
    for encoder in plan.checkpoint.family.encoders:
        tokenizer_from_checkpoint(plan.checkpoint, encoder, folder / tokenizer_file(encoder))
    graphs: dict[str, Graph] = {}
    components: dict[str, Component] = {}
    for name in names:
        graphs[name], components[name] = _component(plan, name, staging / "models", report)
    engines = {name: component.engine for name, component in components.items() if component.engine}
    check_memory(engines, plan.engine.memory_budget_gb)
    colours = graphs[VAE_DECODER].colours
    assert colours is not None
    manifest = _manifest(plan, key, components, colours)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _component(plan: Plan, component: str, models: Path, report: Report) -> tuple[Graph, Component]:
    """Checkpoint -> verified graph -> component model."""
    folder = models / model_name(plan.name, component)
    (folder / "1").mkdir(parents=True)
    graph = graph_from_component(plan, component, folder / "1" / GRAPH_FILE, report)
    return graph, _triton_model(plan, component, graph, folder, report)


def _triton_model(plan: Plan, component: str, graph: Graph, folder: Path, report: Report) -> Component:
    """Make the Triton model of the folder's graph, for the plan's target."""
    engine = None
    if device_kind([plan.target]) == "cpu":
        component_model_from_onnx(folder, graph.ports)
    else:
        report.stage(component, "building")
        model = GpuModel(
            plan.target, graph.precision, component, graph.ports, _ranges(plan, component, graph), plan.engine
        )
        engine = gpu_model_from_onnx(folder, model, report.note)
    sha256, size = (engine.sha256, engine.bytes) if engine else _hash_and_bytes(onnx_files(graph.path))
    inputs, outputs = graph.ports
    return Component(
        folder.name,
        inputs,
        outputs,
        sha256,
        size,
        engine,
        graph.precision,
        graph.float32,
        graph.quantization,
        graph.lora,
    )


def _hash_and_bytes(files: list[Path]) -> tuple[str, int]:
    return sha256_of(files), sum(file.stat().st_size for file in files)


def _ranges(plan: Plan, component: str, graph: Graph) -> ShapeRanges:
    size = plan.vae_size if component in VAE_COMPONENTS else plan.size
    rows = Range(1, 1, 1) if component == PREVIEW_DECODER else plan.rows  # previews are made one by one
    others = {"adapters": Range(1, 2, graph.lora.adapters)} if graph.lora else {}
    return ShapeRanges(size, rows, plan.checkpoint.latent_scale, plan.checkpoint.token_limit, others)


def _manifest(plan: Plan, key: str, components: dict[str, Component], colours: LatentColours) -> Manifest:
    checkpoint = plan.checkpoint
    return Manifest(
        name=plan.name,
        family=checkpoint.family.name,
        target=plan.target,
        precision=plan.precision,
        source=plan.source,
        key=key,
        size=plan.size,
        vae_size=plan.vae_size,
        rows=plan.rows,
        latent_channels=checkpoint.latent_channels,
        latent_scale=checkpoint.latent_scale,
        guidance_scale=checkpoint.guidance_scale,
        token_limit=checkpoint.token_limit,
        scheduler=dict(checkpoint.scheduler),
        components=components,
        colours=colours,
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
