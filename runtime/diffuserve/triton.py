"""The public model inside Triton. Its calls, metrics and replies are in `bls`, `triton_metrics` and `triton_reply`.

Every path of a decoupled request must end with an error or a final response, or its client waits forever.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import triton_python_backend_utils as pb_utils

from diffuserve import errors, wire
from diffuserve.admission import Admission
from diffuserve.bls import BlsRunner
from diffuserve.cancellation import CancelWatch
from diffuserve.components import CallLog, ComponentRunner
from diffuserve.logs import LogTelemetry, log_as_json
from diffuserve.lora.folder import DEFAULT_BUDGET
from diffuserve.manifest import Deployment
from diffuserve.metrics import BackgroundRegistry, MetricsTelemetry
from diffuserve.request import Event
from diffuserve.service import DiffusionService, Reply
from diffuserve.sharing import SharingOptions
from diffuserve.spec import device_kind
from diffuserve.telemetry import Fanout, Telemetry
from diffuserve.triton_metrics import TritonMetrics
from diffuserve.triton_reply import TritonReply

__all__ = [
    "CALL_LOG_VARIABLE",
    "DEPLOYMENT_VARIABLE",
    "EMBEDDINGS_VARIABLE",
    "HTTP_URL_VARIABLE",
    "LOG_LEVEL_VARIABLE",
    "LORAS_VARIABLE",
    "LORA_BUDGET_VARIABLE",
    "SNAPSHOT_KEY_VARIABLE",
    "TARGET_STEP_VARIABLE",
    "TOKEN_VARIABLE",
    "DiffusionModel",
]

DEPLOYMENT_VARIABLE: Final = "DIFFUSERVE_DEPLOYMENT"
EMBEDDINGS_VARIABLE: Final = "DIFFUSERVE_EMBEDDINGS"  # a folder of textual inversions instead of the deployment's
LORAS_VARIABLE: Final = "DIFFUSERVE_LORAS"  # a folder of LoRAs, likewise
LORA_BUDGET_VARIABLE: Final = "DIFFUSERVE_LORA_BUDGET_MB"  # of LoRA files held in memory
CALL_LOG_VARIABLE: Final = "DIFFUSERVE_CALL_LOG"  # a file to write each component call to, for benches
LOG_LEVEL_VARIABLE: Final = "DIFFUSERVE_LOG_LEVEL"
SNAPSHOT_KEY_VARIABLE: Final = "DIFFUSERVE_SNAPSHOT_KEY"  # what snapshots are signed with; without it, one of its own
TOKEN_VARIABLE: Final = "DIFFUSERVE_TOKEN"  # what whoever drains the server must know
HTTP_URL_VARIABLE: Final = "DIFFUSERVE_HTTP_URL"  # of this very server, where it can be asked to load models
TARGET_STEP_VARIABLE: Final = "DIFFUSERVE_TARGET_STEP_MS"  # what a UNet call should not exceed

_OPENING_SECONDS: Final = 2.0

_log: Final = logging.getLogger(__name__)


def _folder(variable: str) -> Path | None:
    """The folder that an environment variable names; None where it is not set."""
    text = os.environ.get(variable, "")
    return Path(text) if text else None


def _megabytes(variable: str, default: int) -> int:
    """The bytes that an environment variable names in MiB; `default` where it is not set."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise pb_utils.TritonModelException(f"{variable} is {text!r}, and must be a whole number of MiB, 1 at least")
    return int(text) << 20


def _milliseconds(variable: str) -> float | None:
    """The seconds that an environment variable names in milliseconds; None where it is not set."""
    text = os.environ.get(variable, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise pb_utils.TritonModelException(f"{variable} is {text!r}, and must be a number of milliseconds above 0")
    return value / 1000


class DiffusionModel:
    """What Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        log_as_json(os.environ.get(LOG_LEVEL_VARIABLE, "INFO"))
        root = os.environ.get(DEPLOYMENT_VARIABLE)
        if not root:
            raise pb_utils.TritonModelException(
                f"{DEPLOYMENT_VARIABLE} is not set; it must name the deployment's folder (`make serve` sets it)"
            )
        # The engines have the cores, or the GPU; the loop's own arithmetic is a few numbers a row.
        torch.set_num_threads(1)
        deployment = Deployment.load(Path(root))
        try:
            sharing = SharingOptions.from_environment(os.environ)
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        device = _device(deployment, args)
        self._bls = BlsRunner(device, os.environ.get(HTTP_URL_VARIABLE, ""))
        runner: ComponentRunner = self._bls
        if log := os.environ.get(CALL_LOG_VARIABLE):
            runner = CallLog(runner, Path(log))
        self._cancels = CancelWatch()
        self._registry = BackgroundRegistry(TritonMetrics())
        self._telemetry = _telemetry(self._registry, deployment)
        self._service = DiffusionService(
            deployment,
            runner,
            telemetry=self._telemetry,
            calibrate=True,
            target_step=_milliseconds(TARGET_STEP_VARIABLE),
            device=device,
            key=os.environ.get(SNAPSHOT_KEY_VARIABLE, "").encode(),
            embeddings=_folder(EMBEDDINGS_VARIABLE),
            loras=_folder(LORAS_VARIABLE),
            lora_budget=_megabytes(LORA_BUDGET_VARIABLE, DEFAULT_BUDGET),
            control=self._bls,
            limits=sharing.limits,
            weights=sharing.weights,
            pinned=sharing.pinned,
        )
        self._bls.may_use, self._bls.lacking = self._service.may_use, self._service.lacking
        self._admission = Admission(self._service.submit, self._refuse, self._service.heartbeats)
        self._token = os.environ.get(TOKEN_VARIABLE, "").encode()
        # The first request shows that the instance is made. A server that gets none still measures its engines.
        self._opening = threading.Timer(_OPENING_SECONDS, self._bls.open)
        self._opening.daemon = True
        self._opening.start()

    def execute(self, requests: list[Any]) -> None:
        self._bls.open()
        self._service.open()
        for request in requests:
            self._accept(request)

    def _accept(self, request: Any) -> None:
        reply = TritonReply(request.get_response_sender(), self._cancels)
        request_id = request.request_id() or uuid.uuid4().hex
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            parameters = json.loads(request.parameters() or "{}")
            operation = wire.decode_operation(tensors, parameters)
            if operation is not None:
                self._operate(operation, reply, request_id)
                return
            trace = _trace_context(request)
            if trace:
                _log.info("request traced", extra={"request_id": request_id, **trace})
            self._admission.submit(wire.decode_request(tensors, parameters), reply, request_id=request_id, trace=trace)
        except Exception as error:
            self._refuse(reply, request_id, error)

    def _operate(self, operation: wire.Operation, reply: TritonReply, request_id: str) -> None:
        """Answer an operation; a drain is answered when it is over."""
        if operation.name == "status":
            reply.send(_status(self._service), final=True)
            return
        if not self._token or not hmac.compare_digest(operation.token.encode(), self._token):
            raise errors.InvalidArgumentError(
                "drain needs the token that the server was started with; end the server's process with SIGTERM instead",
                input="operation",
            )

        def drain() -> None:
            try:
                self._service.drain(operation.grace_s)
                reply.send(_status(self._service), final=True)
            except Exception as error:
                self._refuse(reply, request_id, error)

        threading.Thread(target=drain, name="drain", daemon=True).start()

    def _refuse(self, reply: Reply, request_id: str, error: Exception) -> None:
        if not isinstance(error, errors.DiffuserveError):
            _log.error("a request could not be accepted", extra={"request_id": request_id}, exc_info=error)
            error = errors.InternalError(f"a bug in the server: {error!r}")
        # Not the message, which quotes what was asked for.
        facts = {"outcome": error.code, "input": error.detail.get("input")}
        _log.info("request refused", extra={"request_id": request_id, **facts})
        self._telemetry.refused(error.code)
        try:
            reply.fail(error)
        except Exception:  # there is no other way to this client, and others' requests are not to suffer for it
            _log.exception("a refusal could not be sent", extra={"request_id": request_id})

    def finalize(self) -> None:
        self._opening.cancel()
        self._admission.close()
        self._service.close()
        self._cancels.close()
        self._registry.close()


def _status(service: DiffusionService) -> Event:
    return Event(kind="status", index=0, step=0, steps=0, seed=0, data=b"", info=service.status())


def _device(deployment: Deployment, args: Mapping[str, str]) -> torch.device:
    """Where the loop keeps its tensors: on a GPU, this instance's, or the first that the server sees."""
    kind = device_kind(deployment.manifest(name).target for name in deployment.checkpoints)
    if kind == "cpu":
        return torch.device("cpu")
    index = args["model_instance_device_id"] if args["model_instance_kind"] == "GPU" else "0"
    return torch.device(kind, int(index))


def _telemetry(registry: BackgroundRegistry, deployment: Deployment) -> Telemetry:
    try:
        return Fanout(LogTelemetry(), MetricsTelemetry(registry, deployment.checkpoints))
    except pb_utils.TritonModelException as error:
        _log.warning("the server publishes no metrics (%s)", error)
        return LogTelemetry()


def _trace_context(request: Any) -> dict[str, str] | None:
    """The W3C trace context of a request that the server traces with OpenTelemetry: traceparent, and tracestate.

    The text, and not the trace: Triton frees that while the request still steps, and a call that is given a freed
    trace ends the server's process with a segmentation fault.
    """
    context = request.trace().get_context()
    return {str(name): str(value) for name, value in json.loads(context).items()} if context else None
