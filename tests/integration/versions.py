"""Another version of an exported checkpoint, put into a deployment's folder as the export puts it: the list last."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import Deployment

__all__ = ["add_version"]


def add_version(root: Path, source: str, name: str, *, brightness: float = 0.0, broken: bool = False) -> None:
    """A copy of checkpoint `source` under a name of its own, whose pictures are brighter by so much of 2.

    `broken` leaves out its UNet's graph.
    """
    deployment = Deployment.load(root)
    manifest, components = deployment.manifest(source), {}
    for part, component in manifest.components.items():
        folder = deployment.models / f"{name}_{part}"
        shutil.copytree(deployment.models / component.model, folder, ignore=shutil.ignore_patterns("__pycache__"))
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        config.name = folder.name
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        components[part] = replace(component, model=folder.name)
    _brighten(deployment.models / f"{name}_vae_decoder" / "1" / "model.onnx", brightness)
    if broken:
        (deployment.models / f"{name}_unet" / "1" / "model.onnx").unlink()
    shutil.copytree(deployment.folder(source), deployment.folder(name))
    other = replace(manifest, name=name, key=f"{manifest.key} {name}", components=components)
    (deployment.folder(name) / "manifest.json").write_text(other.to_json(), encoding="utf-8")
    listed = Deployment(root, (*deployment.checkpoints, name))
    (root / ".deployment.json").write_text(listed.to_json(), encoding="utf-8")
    (root / ".deployment.json").replace(root / Deployment.FILE)


def _brighten(file: Path, brightness: float) -> None:
    graph = onnx.load(file)
    biases = [one for one in graph.graph.initializer if list(one.dims) == [3]]
    assert len(biases) == 1, "the last convolution's"
    changed = numpy_helper.to_array(biases[0]) + np.float32(brightness)
    biases[0].CopyFrom(numpy_helper.from_array(changed, biases[0].name))
    onnx.save(graph, file)
