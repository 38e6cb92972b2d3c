"""(d) The exported ONNX graphs in this process, one request at a time behind a lock: no server and no batching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from diffuserve.components import InProcessRunner
from diffuserve.manifest import Deployment
from diffuserve.onnx_session import open_session
from diffuserve.request import GenerateRequest
from diffuserve.spec import LATENTS, PIXELS, TEXT_ENCODER, UNET, VAE_DECODER
from peers.common import Made, Places, Serve
from peers.one_request import Array, OneRequest

__all__ = ["onnx_model", "serial"]

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def serial(places: Places) -> Iterator[Serve]:
    deployment = Deployment.load(places.deployment)
    steps = OneRequest(deployment)
    components = steps.manifest.components
    used = [components[name] for name in (TEXT_ENCODER, UNET, VAE_DECODER)]
    runner = InProcessRunner(
        {one.model: onnx_model(deployment.models / one.model / "1" / "model.onnx") for one in used}
    )
    lock = threading.Lock()

    def run(component: str, output: str, **inputs: Array) -> Array:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        array: Array = runner.run(components[component], tensors)[output].numpy()
        return array

    def serve(request: GenerateRequest) -> Made:
        with lock:
            hidden_states = run(TEXT_ENCODER, "hidden_states", **steps.text_inputs(request))
            loop = steps.loop(request, hidden_states)
            inputs = next(loop)
            while True:
                try:
                    inputs = loop.send(run(UNET, "model_output", **inputs))
                except StopIteration as done:
                    pixels = run(VAE_DECODER, PIXELS, **{LATENTS: done.value})
                    return Made(steps.picture(pixels))

    yield serve


def onnx_model(graph: Path) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """The graph in ONNX Runtime, as InProcessRunner takes it."""
    session = open_session(graph, threads=0)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Tensors) -> dict[str, torch.Tensor]:
        arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run
