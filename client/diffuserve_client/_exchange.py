"""One try of a request: its conversation with one server, without IO. Messages in, messages out."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import grpc
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import serialize_byte_tensor

from diffuserve.errors import (
    DEAD_PROCESS,
    CancelledError,
    DeadlineError,
    DiffuserveError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    from_wire,
)
from diffuserve.request import MAX_IMAGES, MAX_STEPS, Event, GenerateRequest
from diffuserve.wire import (
    INPUTS,
    MODEL_NAME,
    OUTPUTS,
    WIRE_VERSION,
    Array,
    decode_event,
    encode_operation,
    encode_request,
)
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._events import typed
from diffuserve_client._timeout import Timeout

__all__ = ["CHANNEL_OPTIONS", "Exchange", "StatusExchange", "connect_failure"]

CHANNEL_OPTIONS: Final = (
    # gRPC receives 4 MB by default, less than a large PNG.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that is not told otherwise hangs up on clients that ping more often than every 5 minutes.
    ("grpc.keepalive_time_ms", 360_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # While a picture is made the client sends nothing; the default of 2 would end the pings after 12 minutes.
    ("grpc.http2.max_pings_without_data", 0),
    # Channels of one process share connections by default, and with them the wait after a failed attempt: a new
    # channel would go on saying "connection refused" for a while after the server came back.
    ("grpc.use_local_subchannel_pool", 1),
)

_SLOWEST_UPLOAD: Final = 50_000  # bytes per second, below which a stall timeout needs to be longer
_DATATYPES: Final = {spec.name: spec.datatype for spec in INPUTS}
_TLS_FAILED: Final = re.compile(r"SSL|TSI_|\bTls\b|verification check")
_STATUS_LOST: Final = "Internal error from Core"
_UNKNOWN_MODEL: Final = "Request for unknown model"
_CREDENTIALS_REFUSED: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Exchange:
    """What to send, what the answers mean, and whether the last has come.

    `url` is for the error messages. With `wants_queued` the server is asked for its ETA and load even where the request
    wants no progress; who made the exchange leaves out what comes of it. `is_handed_over`: a snapshot came.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        url: str,
        timeout: Timeout,
        request_id: str = "",
        wants_queued: bool = False,
    ) -> None:
        self.finished = False
        self.is_handed_over = False
        self._request = request
        self._request_id = request_id
        self._wants_queued = wants_queued
        self._url = url
        self._timeout = timeout
        self._images: set[int] = set()
        self._uploading = 0  # bytes that are on their way, for all that is known
        # How many pictures a resumed request still has is in its snapshot, which only servers can read.
        self._expected = None if request.resume else request.num_images

    def message(self) -> Any:
        """The ModelInferRequest to send. Raises InvalidArgumentError for numbers that the wire cannot hold."""
        message = service_pb2.ModelInferRequest(
            model_name=MODEL_NAME, model_version=str(WIRE_VERSION), id=self._request_id
        )
        # Tells a finished request from a stream that merely ended.
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, array in self._tensors().items():
            is_bytes = _DATATYPES[name] == "BYTES"
            message.inputs.add(name=name, datatype=_DATATYPES[name], shape=array.shape)
            message.raw_input_contents.append(serialize_byte_tensor(array).item() if is_bytes else array.tobytes())
        self._uploading = message.ByteSize()
        return message

    @property
    def stall(self) -> float:
        """Seconds without an answer, after which the server counts as dead.

        The first answer comes when the request has arrived, and how far that is gRPC does not tell.
        """
        return self._timeout.stall + self._uploading / _SLOWEST_UPLOAD

    def _tensors(self) -> Mapping[str, Array]:
        request = self._with_heartbeat()
        if self._wants_queued and not request.progress_every:
            request = replace(request, progress_every=MAX_STEPS)
        return encode_request(request)

    def receive(self, response: Any) -> Event | None:
        """Read one ModelStreamInferResponse; None where it only says that the request is done, or still lives.

        Raises the error that the server sent, or InternalError for an answer that does not fit the request.
        """
        self._uploading = 0
        if response.error_message:
            self.finished = True
            raise self._server_error(response.error_message)
        infer = response.infer_response
        event = self._event(infer) if infer.outputs else None
        if infer.parameters["triton_final_response"].bool_param:
            self._finish()
        if event is not None and event.kind == "heartbeat" and not self._request.heartbeat_ms:
            return None  # that one was for the stall timeout
        return event

    def _with_heartbeat(self) -> GenerateRequest:
        """The request with signs of life often enough for the stall timeout."""
        asked, needed = self._request.heartbeat_ms, self._timeout.heartbeat_ms
        return replace(self._request, heartbeat_ms=min(asked, needed) if asked else needed)

    def ended(self) -> DiffuserveError:
        """The error of a stream that ended before the final response."""
        return InternalError(f"the server ended the stream early, {self._progress()}; its log may say why")

    def stalled(self) -> DiffuserveError:
        """The error of a stream on which nothing came within the stall timeout."""
        timeout = self._timeout
        uploaded = f" and {self._uploading} bytes sent" if self._uploading else ""
        return ConnectionFailedError(
            f"nothing came from {self._url} for {round(self.stall, 1):g} s, {self._progress()}{uploaded}, and a server "
            f"that lives sends a sign of it every {timeout.heartbeat_ms} ms; send the request again when the server is "
            "back, or allow a longer stall timeout (--stall) on a slow line",
            url=self._url,
            stall=timeout.stall,
        )

    def failure(self, code: Any, details: str | None) -> DiffuserveError:
        """The error that a stream's status means."""
        details = details or code.name
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return _deadline(self._timeout, self._url, self._progress())
        # Of a call that a server ends while it is sent, grpc.aio loses the status at times, and says this instead.
        if code is grpc.StatusCode.UNAVAILABLE or details == _STATUS_LOST:
            return ConnectionFailedError(
                f"the connection to {self._url} was lost, {self._progress()} ({_cause(details)}); send it again when "
                "the server is back",
                url=self._url,
            )
        if code is grpc.StatusCode.CANCELLED:
            return CancelledError(f"the request was cancelled, {self._progress()} ({details})")
        if code in _CREDENTIALS_REFUSED:
            return _refused(self._url, details)
        return self._server_error(details)

    def _event(self, infer: Any) -> Event:
        try:
            result = InferResult(infer)
            tensors = {spec.name: result.as_numpy(spec.name) for spec in OUTPUTS}
        except (ValueError, TypeError, IndexError, KeyError, struct.error) as error:
            raise InternalError(f"the server's answer cannot be read ({error}), {self._progress()}") from error
        event = decode_event({name: array for name, array in tensors.items() if array is not None})
        if not isinstance(event.info, dict):
            raise InternalError(f"the server's {event.kind} has {str(event.info)[:64]!r} as info, which is no object")
        if event.kind == "snapshot":
            self.is_handed_over = True
        elif event.kind == "image":
            if event.index in self._images or not 0 <= event.index < (self._expected or MAX_IMAGES):
                raise InternalError(f"the server sent an image {event.index} that was not to come, {self._progress()}")
            self._images.add(event.index)
        if event.data and self._request.image_encoding == "base64":
            try:
                event = replace(event, data=base64.b64decode(event.data, validate=True))
            except binascii.Error as error:
                raise InternalError(f"the server's {event.kind} {event.index} is not base64: {error}") from error
        return typed(event)

    def _finish(self) -> None:
        if not self.is_handed_over and len(self._images) < (self._expected or 1):
            raise InternalError(f"the server called the request done, {self._progress()}; its log may say why")
        self.finished = True

    def _progress(self) -> str:
        of_all = f" of {self._expected}" if self._expected else ""
        return f"{len(self._images)}{of_all} images received"

    def _server_error(self, text: str) -> DiffuserveError:
        error = from_wire(text)
        if error is not None:
            return error
        if DEAD_PROCESS.search(text):
            return UnavailableError(
                f"the process of model {MODEL_NAME!r} on {self._url} died, {self._progress()}; send the request again "
                f"in a few seconds, when its supervisor has started it again (Triton: {text})",
                url=self._url,
            )
        if not text.startswith(_UNKNOWN_MODEL):
            return InternalError(text)
        model = f"model {MODEL_NAME!r} in version {WIRE_VERSION}"
        if text.endswith("is not found"):
            return NotFoundError(
                f"the server at {self._url} does not have {model}, which this client speaks; use a diffuserve server "
                f"and a client of the same release (Triton: {text})",
                url=self._url,
            )
        return UnavailableError(
            f"the server at {self._url} has {model}, but it is not ready; wait for it to load, or see its log "
            f"(Triton: {text})",
            url=self._url,
        )


class StatusExchange(Exchange):
    """Asks how the server is, which is answered by one event.

    `receive` raises InternalError where that does not come, or another.
    """

    def __init__(self, *, url: str, timeout: Timeout) -> None:
        super().__init__(GenerateRequest(prompt=""), url=url, timeout=timeout)
        self._answers = 0

    def _tensors(self) -> Mapping[str, Array]:
        return {**encode_request(self._request), **encode_operation("status")}

    def _event(self, infer: Any) -> Event:
        event = super()._event(infer)
        self._answers += event.kind == "status"
        return event

    def _finish(self) -> None:
        if self._answers != 1:
            raise InternalError(f"the server at {self._url} told its status {self._answers} times; its log may say why")
        self.finished = True


def connect_failure(code: Any, details: str | None, *, url: str, timeout: Timeout) -> DiffuserveError:
    """The error of a server that did not answer the first call."""
    if code is grpc.StatusCode.CANCELLED:
        return CancelledError(f"the request was cancelled while the client connected to {url}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        if timeout.total <= timeout.connect:
            late = _deadline(timeout, url, "none of it begun")
            late.detail["unreachable"] = True
            return late
        reason = f"no answer within {timeout.connect:g} s"
    elif code in _CREDENTIALS_REFUSED:
        return _refused(url, details or code.name)
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        reason = f"it does not speak Triton's gRPC protocol: {details}"
    else:
        reason = _cause(details or code.name)
        if _TLS_FAILED.search(reason):
            return _no_tls(url, reason)
        if "Socket closed" in reason:
            reason = "it hung up at once, as one does that expects TLS, or no gRPC"
    return ConnectionFailedError(
        f"cannot reach a server at {url} ({reason}); start it (make serve) or correct the address, which is host:port "
        "of its gRPC port",
        url=url,
    )


def _refused(url: str, details: str) -> DiffuserveError:
    return InvalidArgumentError(
        f"{url} refuses the client's credentials ({_cause(details)}); correct the token, the headers or the client's "
        "certificate",
        input="token",
        url=url,
    )


def _no_tls(url: str, reason: str) -> DiffuserveError:
    if "WRONG_VERSION_NUMBER" in reason:
        reason, remedy = "it does not speak TLS", "connect without tls, or let the server speak it"
    else:
        remedy = "correct tls: ca must be the authority that signed the server's certificate, and the certificate's "
        remedy += "name the address's, or server_name"
    return ConnectionFailedError(f"TLS with the server at {url} failed ({reason}); {remedy}", url=url, tls=True)


def _deadline(timeout: Timeout, url: str, progress: str) -> DeadlineError:
    return DeadlineError(
        f"the request to {url} was not done within {timeout.total:g} s, {progress}; allow a longer timeout, or ask "
        "for fewer steps, images or pixels",
        timeout=timeout.total,
    )


def _cause(details: str) -> str:
    """gRPC's words without the list of what it tried."""
    return " ".join(details.rpartition("last error: ")[2].split())
