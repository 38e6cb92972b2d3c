"""A gRPC server that speaks Triton's protocol and diffuserve's wire, and answers by a script.

`python fake_triton.py` runs one alone, which sends a progress event and then nothing, for tests that kill it.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import PIL.Image
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from diffuserve.errors import DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve.spec import DEFAULT_STEPS
from diffuserve.wire import INPUTS, MODEL_NAME, OUTPUTS, WIRE_VERSION, Array, decode_request, encode_event

Script = Callable[["FakeTriton", GenerateRequest], Iterator[Any]]


def response(event: Event | None, *, final: bool = False) -> Any:
    """What Triton streams for an event; no event is the empty final response."""
    infer = service_pb2.ModelInferResponse(model_name=MODEL_NAME, model_version=str(WIRE_VERSION))
    infer.parameters["triton_final_response"].bool_param = final
    arrays = encode_event(event) if event is not None else {}
    for spec in OUTPUTS:
        if spec.name in arrays:
            array = arrays[spec.name]
            infer.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            raw = serialize_byte_tensor(array).item() if spec.datatype == "BYTES" else array.tobytes()
            infer.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=infer)


def failure(error: DiffuserveError | str) -> Any:
    """What Triton streams for a failed request."""
    text = error if isinstance(error, str) else error.to_wire()
    return service_pb2.ModelStreamInferResponse(error_message=text)


def picture(colour: str = "red", image_format: str = "png") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(file, image_format.upper())
    return file.getvalue()


def image(index: int = 0, data: bytes = b"picture", seed: int = 7) -> Event:
    return Event(kind="image", index=index, seed=seed + index, data=data, info={"sampler": "ddim"})


def progress(step: int, steps: int | None) -> Event:
    return Event(kind="progress", step=step, steps=steps or DEFAULT_STEPS, info={})


def preview(step: int, steps: int | None, data: bytes, index: int = 0) -> Event:
    return Event(kind="preview", index=index, step=step, steps=steps or DEFAULT_STEPS, data=data, info={})


def answer(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    """A server that does what is asked."""
    for step in range(1, (request.steps or DEFAULT_STEPS) + 1):
        if request.progress_every and step % request.progress_every == 0:
            yield response(progress(step, request.steps))
        if request.preview_every and step % request.preview_every == 0:
            for index in range(request.num_images):
                yield response(preview(step, request.steps, picture("blue", request.image_format), index))
    last = request.num_images - 1
    for index in range(request.num_images):
        yield response(image(index, picture(image_format=request.image_format)), final=index == last)


def heartbeat() -> Event:
    return Event(kind="heartbeat", info={})


def silence(fake: FakeTriton, _: GenerateRequest) -> Iterator[Any]:
    """A server that never answers, until the client goes away."""
    fake.over.wait(60)
    yield from ()


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # gRPC comes untyped
    """`requests` is what came in, `heartbeats` how often each wants signs of life.

    `over` is set when a request is over, on whichever side; `ids` and `headers` are what came with each request.
    """

    def __init__(self, script: Script = answer, address: str = "localhost:0", credentials: Any = None) -> None:
        self.script = script
        self.ids: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.requests: list[GenerateRequest] = []
        self.heartbeats: list[int] = []
        self.over = threading.Event()
        # Without so_reuseport=0 two servers may share one port, and a test's request may reach another's.
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self._pool = ThreadPoolExecutor(32)
        self._server = grpc.server(self._pool, options=unlimited)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port: int = (
            self._server.add_insecure_port(address)
            if credentials is None
            else self._server.add_secure_port(address, credentials)
        )
        self._server.start()

    @property
    def url(self) -> str:
        return f"localhost:{self.port}"

    def stop(self) -> None:
        self.over.set()
        self._server.stop(0).wait()
        self._pool.shutdown()

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self.over.set)
        message = next(request_iterator)
        if message.model_version != str(WIRE_VERSION):
            yield failure(f"Request for unknown model: 'diffusion' version {message.model_version} is not found")
            return
        # tritonclient reads outputs, and inputs look the same.
        infer = service_pb2.ModelInferResponse(raw_output_contents=message.raw_input_contents)
        for tensor in message.inputs:
            infer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        arrays: dict[str, Array] = {tensor.name: InferResult(infer).as_numpy(tensor.name) for tensor in message.inputs}
        assert {tensor.name: tensor.datatype for tensor in message.inputs}.items() <= {
            spec.name: spec.datatype for spec in INPUTS
        }.items()
        request = decode_request(arrays)
        self.ids.append(message.id)
        self.headers.append(dict(context.invocation_metadata()))
        self.heartbeats.append(request.heartbeat_ms)
        self.requests.append(replace(request, heartbeat_ms=0))
        yield from self.script(self, request)


def _progress_then_silence(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    yield response(progress(1, request.steps))
    yield from silence(fake, request)


if __name__ == "__main__":
    import sys

    server = FakeTriton(_progress_then_silence)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.over.wait(60)
