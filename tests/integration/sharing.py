"""Checkpoints that share a text encoder and an autoencoder, with UNets of their own, and what their pictures are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import torch
from PIL import Image

from diffuserve.components import InProcessRunner
from diffuserve.manifest import Deployment
from diffuserve.onnx_session import open_session
from diffuserve.request import GenerateRequest
from diffuserve.service import DiffusionService
from diffuserve.spec import UNET
from unit.fakes import Recorder

__all__ = [
    "NAMES",
    "are_alike",
    "asked",
    "calls",
    "instances_of",
    "pictures",
    "pixels",
    "resident",
    "several_checkpoints",
    "stubs_bytes",
]

NAMES = ("a", "b", "c", "d")
PROMPT = "a large red circle on a blue background"


def several_checkpoints(shapes: Path, out: Path, *, broken: str = "", spoiled: str = "") -> Deployment:
    """The shapes checkpoint under four names with four UNets; and where they are named one more whose UNet lacks its
    graph, and one whose graph is as long as it should be, and no graph.
    """
    original = Deployment.load(shapes).manifest("shapes")
    names = tuple(filter(None, (*NAMES, broken, spoiled)))
    for component in original.components.values():
        if not component.model.endswith(UNET):
            shutil.copytree(shapes / "models" / component.model, out / "models" / component.model)
    for number, name in enumerate(names):
        unet = original.components[UNET]
        folder = shutil.copytree(shapes / "models" / unet.model, out / "models" / f"{name}_unet")
        config = (folder / "config.pbtxt").read_text()
        (folder / "config.pbtxt").write_text(config.replace(f'"{unet.model}"', f'"{name}_unet"'))
        _changed(folder / "1" / "model.onnx", 1 - 0.1 * number)
        if name == broken:
            (folder / "1" / "model.onnx").unlink()
        elif name == spoiled:
            graph = (folder / "1" / "model.onnx").read_bytes()
            (folder / "1" / "model.onnx").write_bytes(graph[: len(graph) // 2] + bytes(len(graph) - len(graph) // 2))
        components = {**original.components, UNET: replace(unet, model=f"{name}_unet")}
        shutil.copytree(shapes / "checkpoints" / "shapes", out / "checkpoints" / name)
        manifest = replace(original, name=name, key=f"{original.key}-{name}", components=components)
        (out / "checkpoints" / name / "manifest.json").write_text(manifest.to_json())
    (out / Deployment.FILE).write_text(Deployment(out, names).to_json())
    return Deployment.load(out)


def _changed(graph: Path, factor: float) -> None:
    """Other weights: the last convolution's, times a factor."""
    model = onnx.load(graph)
    bias = next(one for one in model.graph.initializer if one.name.endswith("conv_out.weight"))
    weights = onnx.numpy_helper.to_array(bias) * np.float32(factor)
    bias.CopyFrom(onnx.numpy_helper.from_array(weights, bias.name))
    onnx.save(model, graph)


def asked(name: str, seed: int = 3, **values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": PROMPT, "checkpoint": name, "seed": seed, "steps": 4, **values})


def pictures(deployment: Deployment, requests: Sequence[GenerateRequest]) -> list[Any]:
    """What the deployment's graphs make of requests, one after the other, in this process and without Triton."""
    models = {
        component.model: _session(deployment, component.model)
        for name in {request.checkpoint or "" for request in requests}
        for component in deployment.manifest(name).components.values()
    }
    service = DiffusionService(deployment, InProcessRunner(models))
    made = []
    for request in requests:
        reply = Recorder()
        service.submit(request, reply)
        assert reply.wait().error is None
        made.append(pixels(reply.events[0].data))
    service.close()
    return made


def _session(deployment: Deployment, model: str) -> Any:
    session = open_session(deployment.models / model / "1" / "model.onnx", 1)
    outputs = [one.name for one in session.get_outputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feed = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        return dict(zip(outputs, map(torch.from_numpy, session.run(outputs, feed)), strict=True))

    return run


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(BytesIO(data))).astype(int)


def are_alike(data: bytes, expected: Any) -> bool:
    return int(np.abs(pixels(data) - expected).max()) <= 1


def resident(status: Mapping[str, Any]) -> set[str]:
    return {name for name, one in status["checkpoints"].items() if one["resident"]}


def stubs_bytes(pid: int) -> int:
    """Resident memory of a tritonserver and of the Python processes of its models."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def instances_of(pid: int) -> list[str]:
    """The instances of Python models that a tritonserver has processes of, such as diffusion_0_0."""
    found = [re.search(r"python_backend_stub .*?(\w+_\d+_\d+) ?", " ".join(one)) for one in _command_lines(pid)]
    return [one[1] for one in found if one]


def _command_lines(pid: int) -> Iterator[list[str]]:
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield process.cmdline()


def calls(log: Path) -> list[dict[str, Any]]:
    """A CallLog's lines."""
    return [json.loads(line) for line in log.read_text().splitlines()]
