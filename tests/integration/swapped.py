"""A GPU deployment made to run here: its engines swapped for ONNX Runtime's, all names and shapes as they were."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import Deployment
from diffuserve_export.component_model import write_config

_MODEL_PY = "from diffuserve.onnx_component import OnnxComponentModel as TritonPythonModel\n"


def swap_engines(root: Path, graphs: dict[str, Path]) -> None:
    """Put `graphs`, by component, in the place of every engine below `root`.

    Of each model's configuration the name, the tensors and the warm-up calls stay; who runs it, and where, changes.
    """
    deployment = Deployment.load(root)
    for name in deployment.checkpoints:
        manifest = deployment.manifest(name)
        for component, described in manifest.components.items():
            _swap(deployment.models / described.model, graphs[component])
        changed = dataclasses.replace(manifest, target="onnxruntime-cpu")
        (deployment.folder(name) / "manifest.json").write_text(changed.to_json(), encoding="utf-8")


def _swap(folder: Path, graph: Path) -> None:
    config = parsed_config(folder)
    swapped = model_config_pb2.ModelConfig(name=config.name, max_batch_size=config.max_batch_size, backend="python")
    for field in ("input", "output", "model_warmup"):
        getattr(swapped, field).extend(getattr(config, field))
    kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    swapped.instance_group.append(model_config_pb2.ModelInstanceGroup(count=config.instance_group[0].count, kind=kind))
    write_config(folder, swapped)
    shutil.rmtree(folder / "1")
    (folder / "1").mkdir()
    (folder / "1" / "model.py").write_text(_MODEL_PY, encoding="utf-8")
    shutil.copyfile(graph, folder / "1" / "model.onnx")


def parsed_config(folder: Path) -> Any:
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())
