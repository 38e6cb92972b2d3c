"""The public model inside Triton: the only user of triton_python_backend_utils.

Every path of a decoupled request must end with an error or a final response, or its client waits forever.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from diffuserve import errors, wire
from diffuserve.admission import Admission
from diffuserve.cancellation import CancelWatch
from diffuserve.components import CallLog, ComponentRunner
from diffuserve.logs import LogTelemetry, log_as_json
from diffuserve.lora.folder import DEFAULT_BUDGET
from diffuserve.manifest import Component, Deployment
from diffuserve.metrics import BackgroundRegistry, Metric, MetricsTelemetry
from diffuserve.request import Event
from diffuserve.server.probe import Probe
from diffuserve.server.processes import ModelProcess
from diffuserve.service import DiffusionService, Reply
from diffuserve.sharing import SharingOptions
from diffuserve.spec import device_kind
from diffuserve.telemetry import Fanout, Telemetry

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

_LOADING_SECONDS: Final = 3600.0  # an engine of many gigabytes from a slow disk
_OPENING_SECONDS: Final = 2.0
_UNLOADING_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02

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


#: What Triton says of a model that is not loaded: another thread loads it again, or a load failed.
_NOT_LOADED: Final = re.compile(r"Model '.*' is not ready")


class _NotThereError(errors.ComponentFailedError):
    """The Python backend's process of a component is gone, or the component is not loaded."""


class BlsRunner:
    """Runs component models by Triton's business logic scripting; outputs stay on the loop's device.

    A component whose process died is loaded again, and the call that found out is made again: no request is lost.
    Where it cannot be loaded, every call tries again.

    Refuses until `open` is called. Triton takes calls as soon as `initialize` returned, but makes what serves them
    a moment later: a call in between ends the server's process with a segmentation fault.

    `http_url` is where the server takes requests to load models, if it is known: a load that fails when this process
    asks for it damages the memory that it shares with Triton 24.10, and a few of them end the server.
    """

    def __init__(self, device: torch.device, http_url: str = "") -> None:
        self._device, self._open = device, False
        self._server = Probe(http_url, _LOADING_SECONDS) if http_url else None
        #: Whether a model is meant to be loaded; others are not loaded again.
        self.may_use: Callable[[str], bool] = lambda model: True  # noqa: ARG005
        #: What keeps a model's files from being loaded; empty where they are whole.
        self.lacking: Callable[[str], str] = lambda model: ""  # noqa: ARG005
        self._reviving, self._revived = threading.Lock(), dict[str, float]()
        self._options: dict[str, Any] = {}
        if device.type == "cuda":  # outputs go to the CPU's memory unless they are asked not to
            memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, device.index)
            self._options["preferred_memory"] = memory

    def open(self) -> None:
        self._open = True

    def run(
        self, component: Component, inputs: Mapping[str, torch.Tensor], *, trace: object | None = None
    ) -> dict[str, torch.Tensor]:
        if not self._open:
            raise errors.ComponentFailedError(
                f"{component.model} cannot be called while Triton makes this model's instance; try again in a moment",
                component=component.model,
            )
        began = time.monotonic()
        try:
            return self._called(component, inputs, trace)
        except _NotThereError as error:
            self._revive(component.model, began, error)
            return self._called(component, inputs, trace)

    def _called(
        self, component: Component, inputs: Mapping[str, torch.Tensor], trace: object | None
    ) -> dict[str, torch.Tensor]:
        request = pb_utils.InferenceRequest(
            model_name=component.model,
            requested_output_names=[output.name for output in component.outputs],
            inputs=[pb_utils.Tensor.from_dlpack(name, tensor.contiguous()) for name, tensor in inputs.items()],
            parameters=dict(trace) if isinstance(trace, Mapping) else {},
            **self._options,
        )
        try:
            response = request.exec()
        except Exception as error:
            raise errors.ComponentFailedError(
                f"{component.model} cannot be called: {error}", component=component.model
            ) from error
        if response.has_error():
            message = response.error().message()
            gone = errors.DEAD_PROCESS.search(message) or _NOT_LOADED.search(message)
            kind = _NotThereError if gone else errors.ComponentFailedError
            raise kind(f"{component.model} failed: {message}", component=component.model)
        return {tensor.name(): self._taken(component, tensor) for tensor in response.output_tensors()}

    def _revive(self, model: str, began: float, error: errors.ComponentFailedError) -> None:
        """Load a component again whose process died, unless that was done since the call that found out began.

        Triton never starts such a process again by itself.
        """
        if not self.may_use(model):
            raise error
        with self._reviving:
            if self._revived.get(model, 0.0) > began:
                return
            _log.error("%s is loaded again: %s", model, error.message)
            if lacks := self.lacking(model):
                raise errors.ComponentFailedError(f"{error.message.rstrip('.')}; {lacks}", component=model) from error
            try:
                pb_utils.unload_model(model_name=model)
                self._load(model)
            except Exception as cause:
                raise errors.ComponentFailedError(
                    f"{error.message.rstrip('.')}; loading it again failed: {cause}", component=model
                ) from cause
            self._revived[model] = time.monotonic()

    def load(self, model: str) -> None:
        """Load a component that is not loaded. Raises ComponentFailedError."""
        if lacks := self.lacking(model):
            raise errors.ComponentFailedError(f"{model}: {lacks}", component=model)
        with self._reviving:
            try:
                self._load(model)
            except Exception as cause:
                raise errors.ComponentFailedError(f"{model}: {_told(cause)}", component=model) from cause

    def _load(self, model: str) -> None:
        """Load a model over HTTP where that can be. Raises what it fails with."""
        if self._server is not None:
            reason = self._server.load(model)
            if reason:
                raise errors.ComponentFailedError(reason, component=model)
            if reason is not None and self.is_ready(model):
                return
            _log.warning("%s names no server that loads %s here; it is loaded without", HTTP_URL_VARIABLE, model)
        pb_utils.load_model(model_name=model)

    def unload(self, model: str) -> None:
        """Unload a component; its process has ended when this returns. Raises ComponentFailedError."""
        process = ModelProcess(os.getpgrp(), model)
        process.is_gone()  # which looks for it now
        with self._reviving:
            try:
                pb_utils.unload_model(model_name=model)
            except Exception as cause:
                raise errors.ComponentFailedError(f"{model}: {_told(cause)}", component=model) from cause
        deadline = time.monotonic() + _UNLOADING_SECONDS
        while process.was_seen and not process.is_gone() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # Triton's child and not ours: its end cannot be awaited

    def is_ready(self, model: str) -> bool:
        return bool(pb_utils.is_model_ready(model_name=model))

    def _taken(self, component: Component, tensor: Any) -> torch.Tensor:
        """An output as torch's tensor, once it is known to be on the loop's device."""
        taken = from_dlpack(tensor.to_dlpack())
        if taken.device != self._device:
            raise errors.ComponentFailedError(
                f"{component.model} gave {tensor.name()} on {taken.device}, and the loop steps on {self._device}: "
                "give the model an instance on that device (instance_group, gpus), and Triton enough of its memory "
                "(--cuda-memory-pool-byte-size)",
                component=component.model,
                output=tensor.name(),
            )
        return taken


def _told(error: Exception) -> str:
    """Triton's words of why a model does not load, in one line."""
    return " ".join(str(error).split())


class TritonMetrics:
    """A registry whose series are at the server's metrics port.

    Each call crosses to the server's process, in about 20 microseconds, and gives up the interpreter's lock
    meanwhile, which takes milliseconds to get back while another thread computes: not for the stepping thread.
    """

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()

    def declare(self, metric: Metric, labels: tuple[str, ...]) -> None:
        self._one(metric, labels)

    def update(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        series = self._one(metric, labels)
        act = {"counter": "increment", "gauge": "set", "histogram": "observe"}[metric.kind]
        getattr(series, act)(value)

    def _one(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        series = self._series.get((metric.name, labels))
        return self._made(metric, labels) if series is None else series

    def _made(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        with self._lock:  # a checkpoint that is new is declared by another thread than that which updates
            if (metric.name, labels) in self._series:
                return self._series[metric.name, labels]
            family = self._families.get(metric.name)
            if family is None:
                kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
                family = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
                self._families[metric.name] = family
            options = {"buckets": list(metric.bounds)} if metric.kind == "histogram" else {}
            series = family.Metric(labels=dict(zip(metric.labels, labels, strict=True)), **options)
            self._series[metric.name, labels] = series
        return series


class TritonReply:
    """One request's response sender, let go with its last response: Triton cannot unload while one is held.

    Triton frees what a question about cancelling reads when the last response is sent: asking meanwhile ends the
    server's process with a segmentation fault. Hence the lock.
    """

    def __init__(self, sender: Any, watch: CancelWatch) -> None:
        self._sender: Any = sender
        self._lock = threading.Lock()
        self._cancelled = False
        self._watch = watch
        watch.add(self)

    def send(self, event: Event, *, final: bool) -> None:
        """Raises InternalError where Triton does not take it; of a last one, that is what the client gets instead."""
        try:
            tensors = [pb_utils.Tensor(name, array) for name, array in wire.encode_event(event).items()]
            self._send(pb_utils.InferenceResponse(output_tensors=tensors), final)
        except Exception as error:
            failure = errors.InternalError(
                f"a response cannot be handed to Triton ({error}); where memory is short, give the server more of it, "
                "and its container more shared memory (--shm-size)"
            )
            if not final:
                raise failure from error
            _log.exception("a last response could not be sent")
            self.fail(failure)

    def fail(self, error: errors.DiffuserveError) -> None:
        status = getattr(pb_utils.TritonError, _STATUS.get(error.code, "INTERNAL"))
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), status))
        try:
            self._send(response, final=True)
        finally:
            with self._lock:
                self._let_go()

    def is_cancelled(self) -> bool:
        return self._cancelled or self._sender is None

    def ask(self) -> bool:
        with self._lock:
            if self._sender is None:
                return False
            self._cancelled = bool(self._sender.is_cancelled())
            return not self._cancelled

    def _send(self, response: Any, final: bool) -> None:
        with self._lock:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
            if final:
                self._let_go()

    def _let_go(self) -> None:
        self._sender = None
        self._watch.discard(self)


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
                self._operate(operation, reply)
                return
            trace = _trace_context(request)
            if trace:
                _log.info("request traced", extra={"request_id": request_id, **trace})
            self._admission.submit(wire.decode_request(tensors, parameters), reply, request_id=request_id, trace=trace)
        except Exception as error:
            self._refuse(reply, request_id, error)

    def _operate(self, operation: wire.Operation, reply: TritonReply) -> None:
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
            self._service.drain(operation.grace_s)
            reply.send(_status(self._service), final=True)

        threading.Thread(target=drain, name="drain", daemon=True).start()

    def _refuse(self, reply: Reply, request_id: str, error: Exception) -> None:
        if not isinstance(error, errors.DiffuserveError):
            _log.error("a request could not be accepted", extra={"request_id": request_id}, exc_info=error)
            error = errors.InternalError(f"a bug in the server: {error!r}")
        _log.info("request refused", extra={"request_id": request_id, "outcome": error.code, "reason": error.message})
        self._telemetry.refused(error.code)
        reply.fail(error)

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
