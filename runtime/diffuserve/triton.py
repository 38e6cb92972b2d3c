"""The public model inside Triton: the only user of triton_python_backend_utils.

Every path of a decoupled request must end with an error or a final response, or its client waits forever.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from diffuserve import errors, wire
from diffuserve.components import CallLog, ComponentRunner
from diffuserve.manifest import Component, Deployment
from diffuserve.request import Event
from diffuserve.service import DiffusionService

__all__ = ["CALL_LOG_VARIABLE", "DEPLOYMENT_VARIABLE", "DiffusionModel"]

DEPLOYMENT_VARIABLE: Final = "DIFFUSERVE_DEPLOYMENT"
CALL_LOG_VARIABLE: Final = "DIFFUSERVE_CALL_LOG"  # a file to write each component call to, for benches

_log: Final = logging.getLogger(__name__)

# Names and not values: Triton puts its classes into pb_utils only after it has imported the model.
_STATUS: Final = {
    "invalid_argument": "INVALID_ARG",
    "not_found": "NOT_FOUND",
    "unsupported": "UNSUPPORTED",
    "cancelled": "CANCELLED",
    "unavailable": "UNAVAILABLE",
    "queue_full": "UNAVAILABLE",
    "deadline": "UNAVAILABLE",
    "draining": "UNAVAILABLE",
}


class BlsRunner:
    """Runs component models by Triton's business logic scripting."""

    def run(self, component: Component, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        request = pb_utils.InferenceRequest(
            model_name=component.model,
            requested_output_names=[output.name for output in component.outputs],
            inputs=[pb_utils.Tensor.from_dlpack(name, tensor.contiguous()) for name, tensor in inputs.items()],
        )
        try:
            response = request.exec()
        except Exception as error:
            raise errors.ComponentFailedError(
                f"{component.model} cannot be called: {error}", component=component.model
            ) from error
        if response.has_error():
            message = response.error().message()
            raise errors.ComponentFailedError(f"{component.model} failed: {message}", component=component.model)
        return {tensor.name(): from_dlpack(tensor.to_dlpack()) for tensor in response.output_tensors()}


class TritonReply:
    """One request's response sender, let go with its last response: Triton cannot unload while one is held."""

    def __init__(self, sender: Any) -> None:
        self._sender: Any = sender

    def send(self, event: Event, *, final: bool) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in wire.encode_event(event).items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        self._send(response, final)

    def fail(self, error: errors.DiffuserveError) -> None:
        status = getattr(pb_utils.TritonError, _STATUS.get(error.code, "INTERNAL"))
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), status))
        self._send(response, final=True)

    def is_cancelled(self) -> bool:
        sender = self._sender
        return sender is None or bool(sender.is_cancelled())

    def _send(self, response: Any, final: bool) -> None:
        sender = self._sender
        if final:
            self._sender = None
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


class DiffusionModel:
    """What Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:  # noqa: ARG002 - Triton's signature
        logging.basicConfig(level=os.environ.get("DIFFUSERVE_LOG_LEVEL", "INFO"), format="%(levelname)s %(message)s")
        root = os.environ.get(DEPLOYMENT_VARIABLE)
        if not root:
            raise pb_utils.TritonModelException(
                f"{DEPLOYMENT_VARIABLE} is not set; it must name the deployment's folder (`make serve` sets it)"
            )
        # The engines have the cores, or the GPU; the loop's own arithmetic is a few numbers a row.
        torch.set_num_threads(1)
        runner: ComponentRunner = BlsRunner()
        if log := os.environ.get(CALL_LOG_VARIABLE):
            runner = CallLog(runner, Path(log))
        self._service = DiffusionService(Deployment.load(Path(root)), runner)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._accept(request)

    def _accept(self, request: Any) -> None:
        reply = TritonReply(request.get_response_sender())
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            parameters = json.loads(request.parameters() or "{}")
            self._service.submit(wire.decode_request(tensors, parameters), reply)
        except errors.DiffuserveError as error:
            reply.fail(error)
        except Exception as error:
            _log.exception("a request could not be accepted")
            reply.fail(errors.InternalError(f"a bug in the server: {error!r}"))

    def finalize(self) -> None:
        self._service.close()
