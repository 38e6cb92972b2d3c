"""(c) The pipeline models inside Triton: one request's loop, and BLS calls to text encoder, UNet and VAE."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from PIL import Image

from diffuserve import wire
from diffuserve.manifest import Deployment
from diffuserve.request import Event, GenerateRequest
from diffuserve.spec import LATENTS, PIXELS, TEXT_ENCODER, UNET, VAE_DECODER
from peers.one_request import Array, OneRequest

__all__ = ["ConcurrentLoops", "OneLoop"]


class _Pipeline:
    """What both variants share."""

    def initialize(self, args: Mapping[str, str]) -> None:  # noqa: ARG002 - Triton's signature
        torch.set_num_threads(1)  # the cores are the engines'
        self.steps = OneRequest(Deployment.load(Path(os.environ["DIFFUSERVE_DEPLOYMENT"])))

    def call(self, component: str, output: str, inputs: Mapping[str, Array]) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self.steps.manifest.components[component].model,
            requested_output_names=[output],
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        )

    def request(self, request: Any) -> GenerateRequest:
        return wire.decode_request({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})

    def reply(self, request: GenerateRequest, pixels: Array) -> Any:
        data = _png(self.steps.picture(pixels))
        steps = self.steps.steps(request)
        event = Event(kind="image", step=steps, steps=steps, seed=request.seed, data=data, info={})
        tensors = [pb_utils.Tensor(name, array) for name, array in wire.encode_event(event).items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)


class OneLoop(_Pipeline):
    """(c2) Each request from its prompt to its picture before the next begins."""

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                response = self._made(self.request(request))
            except Exception as error:
                response = _failure(error)
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _made(self, request: GenerateRequest) -> Any:
        loop = self.steps.loop(request, self._run(TEXT_ENCODER, "hidden_states", self.steps.text_inputs(request)))
        inputs = next(loop)
        while True:
            try:
                inputs = loop.send(self._run(UNET, "model_output", inputs))
            except StopIteration as done:
                return self.reply(request, self._run(VAE_DECODER, PIXELS, {LATENTS: done.value}))

    def _run(self, component: str, output: str, inputs: Mapping[str, Array]) -> Array:
        return _array(self.call(component, output, inputs).exec(), output)


class ConcurrentLoops(_Pipeline):
    """(c1) All requests' loops at once. Triton runs `execute` as a coroutine and does not wait for its end."""

    async def execute(self, requests: list[Any]) -> None:
        await asyncio.gather(*(self._serve(request) for request in requests))

    async def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            response = await self._made(self.request(request))
        except Exception as error:
            response = _failure(error)
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _made(self, request: GenerateRequest) -> Any:
        loop = self.steps.loop(request, await self._run(TEXT_ENCODER, "hidden_states", self.steps.text_inputs(request)))
        inputs = next(loop)
        while True:
            # The dynamic batcher joins along the first dimension of what has at least two.
            inputs["timestep"] = inputs["timestep"][:, None]
            try:
                inputs = loop.send(await self._run(UNET, "model_output", inputs))
            except StopIteration as done:
                return self.reply(request, await self._run(VAE_DECODER, PIXELS, {LATENTS: done.value}))

    async def _run(self, component: str, output: str, inputs: Mapping[str, Array]) -> Array:
        return _array(await self.call(component, output, inputs).async_exec(), output)


def _array(response: Any, output: str) -> Array:
    if response.has_error():
        raise RuntimeError(response.error().message())
    array: Array = pb_utils.get_output_tensor_by_name(response, output).as_numpy()
    return array


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
