"""A small checkpoint of each family, deployments of them, and diffusers' pipelines of the same folders.

They share what they can with the shapes checkpoint, since a graph takes ten to thirty seconds to export: the
autoencoder always, for SD2 the UNet, for LCM the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import CHECKPOINT
from diffuserve.manifest import Component, Deployment
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, assembly, export_checkpoint, graphs
from diffuserve_export.checkpoint import CONTROLNET, Checkpoint, part_of
from diffuserve_export.controlnet import with_controlnet
from diffuserve_export.graphs import Graph
from diffuserve_export.lora import add_lora, lora_layout
from diffuserve_export.modules import module_of
from diffuserve_export.ports import with_lora
from diffuserve_export.sources import open_checkpoint
from unit.export.conftest import float32_graph, without_logs
from unit.export.controlnets import random_controlnet, with_middle
from unit.export.pipelines import random_pipeline

__all__ = ["FAMILIES", "Families", "Model", "Models", "exported_families", "torch_families"]

Model = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
#: As InProcessRunner takes them.
Models = dict[str, Model]

#: accelerate, where it is installed, replaces methods of torch's while a model is loaded.
_LOADING = threading.Lock()
#: Of the published SDXL's scheduler, for the samplers that it is not.
_OTHERS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
_TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def _sd21(folder: Path) -> None:
    """OpenCLIP's activation and padding, and v-prediction."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "diffuserve.json").unlink()
    made = random_pipeline("sd21")
    config = CLIPTextConfig(**{**made.text_encoder.config.to_dict(), "hidden_size": 64})
    encoder = CLIPTextModel(config)
    # As in trained ones: without it the mean of the hidden states, which weights on words restore, would be zero.
    torch.nn.init.normal_(encoder.final_layer_norm.bias)
    encoder.save_pretrained(folder / "text_encoder")
    made.tokenizer.save_pretrained(folder / "tokenizer")
    _set_scheduler(folder, _config(made.scheduler))


def _lcm(folder: Path) -> None:
    """A UNet that is told the guidance scale."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "diffuserve.json").unlink()
    made = random_pipeline("lcm")
    unet = diffusers.UNet2DConditionModel.from_config({**made.unet.config, "cross_attention_dim": 64})
    unet.save_pretrained(folder / "unet")
    _set_scheduler(folder, _config(made.scheduler))


def _sdxl(folder: Path) -> None:
    """Two text encoders, pooled text and the picture's size."""
    made = random_pipeline("sdxl")
    made.save_pretrained(folder)
    shutil.copytree(CHECKPOINT / "vae", folder / "vae", dirs_exist_ok=True)
    _set_scheduler(folder, {**_config(made.scheduler), **_OTHERS})


def _inpaint(folder: Path) -> None:
    """A UNet that is told masks."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "diffuserve.json").unlink()
    config = {**random_pipeline("sd15-inpaint").unet.config, "cross_attention_dim": 64}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


def _sdxl_inpaint(folder: Path) -> None:
    """SDXL's UNet, told masks."""
    _sdxl(folder)
    config = {**random_pipeline("sdxl").unet.config, "in_channels": 9}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


def _control(folder: Path) -> None:
    """The shapes checkpoint and its own ControlNet."""
    shutil.copytree(CHECKPOINT, folder)
    shutil.copytree(CHECKPOINT.with_name("shapes-control"), folder / CONTROLNET)


def _controlled(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Another family's, with a UNet that a ControlNet can be made for, and a random one of those."""

    def made(folder: Path) -> None:
        make(folder)
        unet = with_middle(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"))
        unet.save_pretrained(folder / "unet")
        random_controlnet(unet, levels=4).save_pretrained(folder / CONTROLNET)

    return made


def _turbo(folder: Path) -> None:
    """SDXL's, with Turbo's scheduler."""
    _sdxl(folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    _set_scheduler(folder, {**config, **_TURBO})


def _config(scheduler: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


def _set_scheduler(folder: Path, config: dict[str, Any]) -> None:
    """Where diffusers looks, and where the export does."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


#: What makes each one's folder, and the precision that it is exported in.
FAMILIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "sd15": (lambda folder: shutil.copytree(CHECKPOINT, folder), "fp32"),
    "sd15-inpaint": (_inpaint, "fp32"),
    "sd21": (_sd21, "fp32"),
    "lcm": (_lcm, "fp32"),
    "sdxl": (_sdxl, "fp32"),
    "sdxl-inpaint": (_sdxl_inpaint, "fp32"),
    "turbo": (_turbo, "fp32"),
    "sdxl-half": (_sdxl, "fp16"),
    "sd15-control": (_control, "fp32"),
    "inpaint-control": (_controlled(_inpaint), "fp32"),
    "sdxl-control": (_controlled(_sdxl), "fp32"),
    "sdxl-control-half": (_controlled(_sdxl), "fp16"),
}


class Families:
    """The folders of the checkpoints, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            torch.manual_seed(5)
            FAMILIES[name][0](folder)
        return folder

    @cache  # noqa: B019 - lives as long as the tests
    def pipeline(self, name: str, class_name: str) -> Any:
        """diffusers' own, in float32."""
        pipeline_class = getattr(diffusers, class_name)
        options: dict[str, Any] = (
            {} if "XL" in class_name else {"safety_checker": None, "requires_safety_checker": False}
        )
        if "ControlNet" in class_name:
            folder = self.folder(name) / CONTROLNET
            options["controlnet"] = diffusers.ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline = pipeline_class.from_pretrained(self.folder(name), torch_dtype=torch.float32, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def exported_families(
    families: Families, names: Sequence[str], out: Path, shapes: Path, *, lora_rank: int = 0
) -> Deployment:
    """Export checkpoints into the deployment `out`, where they are not there already.

    `shapes` is the shapes checkpoint's deployment, whose graphs are not made again.
    """
    return _deployed(families, names, out, _shared_graphs(shapes, families.root / "graphs"), lora_rank)


def torch_families(
    families: Families, names: Sequence[str], out: Path, *, lora_rank: int = 0
) -> tuple[Deployment, Models]:
    """A deployment without graphs, and the torch modules that stand for them, in float32."""

    def no_graph(plan: Any, component: str, path: Path, report: Any) -> Graph:
        path.write_text(f"{plan.name} {component}")  # else all would be one, and exported once
        graph = float32_graph(plan.checkpoint, component, path)
        if not lora_rank or component not in (UNET, *plan.checkpoint.family.encoders):
            return graph
        layout = lora_layout(module_of(plan.checkpoint, component), lora_rank, plan.rows.max, 4)
        return replace(graph, lora=layout, ports=with_lora(graph.ports, layout.size))

    deployment = _deployed(families, names, out, no_graph, lora_rank)
    models = {}
    for name in names:
        opened = open_checkpoint(families.folder(name))
        if (families.folder(name) / CONTROLNET).is_dir():
            opened = with_controlnet(opened, families.folder(name) / CONTROLNET)
        for component, described in deployment.manifest(name).components.items():
            models[described.model] = _torch_model(opened, component, described)
    return deployment, models


def _torch_model(opened: Checkpoint, component: str, described: Component) -> Model:
    @cache
    def module() -> Any:
        made = module_of(opened, component)
        if described.lora:
            add_lora(made, described.lora)
        return made

    def loaded() -> Any:
        with _LOADING:
            return module()

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            output = loaded()(*(inputs[one.name] for one in described.inputs))
        outputs = output if isinstance(output, tuple) else (output,)
        return {one.name: tensor for one, tensor in zip(described.outputs, outputs, strict=True)}

    return run


def _deployed(
    families: Families, names: Sequence[str], out: Path, graph: Callable[..., Graph], lora_rank: int = 0
) -> Deployment:
    with pytest.MonkeyPatch.context() as patched, without_logs():
        patched.setattr(assembly, "graph_from_component", graph)
        for name in names:
            folder, precision = families.folder(name), FAMILIES[name][1]
            controlnet = str(folder / CONTROLNET) if (folder / CONTROLNET).is_dir() else ""
            # In one piece, as diffusers decodes them.
            options = ExportOptions(
                checkpoint=str(folder),
                controlnet=controlnet,
                out=out,
                name=name,
                precision=precision,
                vae_tile=192,
                lora_rank=lora_rank,
            )
            export_checkpoint(options)
    return Deployment.load(out)


def _shared_graphs(shapes: Path, store: Path) -> Callable[..., Graph]:
    """In place of `graph_from_component`: what is the same to the byte is exported once."""
    known: dict[tuple[str, ...], Graph] = {}
    opened = open_checkpoint(CHECKPOINT)
    store.mkdir(exist_ok=True)
    for component, described in Deployment.load(shapes).manifest("shapes").components.items():
        path = shapes / "models" / described.model / "1" / "model.onnx"
        known[_identity(opened, component, "fp32")] = float32_graph(opened, component, path)

    def graph(plan: Any, component: str, path: Path, report: Any) -> Graph:
        identity = _identity(plan.checkpoint, component, plan.precisions[component], plan.lora_rank)
        if identity not in known:
            made = graphs.graph_from_component(plan, component, path, report)
            known[identity] = replace(made, path=shutil.copyfile(path, store / f"{len(known)}.onnx"))
        else:
            shutil.copyfile(known[identity].path, path)
        return replace(known[identity], path=path)

    return graph


def _identity(checkpoint: Checkpoint, component: str, precision: str, lora_rank: int = 0) -> tuple[str, ...]:
    names = [part_of(component), *([CONTROLNET] if component == UNET and CONTROLNET in checkpoint.parts else [])]
    layers = (checkpoint.family.hidden_layer, checkpoint.clip_skip) if component in checkpoint.family.encoders else ()
    digest = hashlib.sha256()
    for part in (checkpoint.parts[name] for name in names):
        digest.update(json.dumps(dict(part.config), sort_keys=True).encode())
        for file in part.files:
            digest.update(file.read_bytes())
    takes_adapters = lora_rank and component in (UNET, *checkpoint.family.encoders)
    return component, precision, str(layers), str(takes_adapters and lora_rank), digest.hexdigest()
