"""The synchronous way to a server: one gRPC channel, one stream per request.

Over the generated stubs and not tritonclient's `start_stream`: that one holds a single stream per client, while the
stubs give each request a stream of its own on one shared connection, with a deadline, a cancel and a status.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from diffuserve.errors import CancelledError, DiffuserveError
from diffuserve.request import Event
from diffuserve_client._exchange import CHANNEL_OPTIONS, Exchange, connect_failure
from diffuserve_client._security import Security
from diffuserve_client._timeout import Timeout

__all__ = ["Call", "Connection"]

_AT_LEAST_SECONDS: Final = 0.1  # a process that was stopped itself must first read what came meanwhile


class Connection:
    """A channel to one server, which many threads may use at once."""

    def __init__(self, url: str, timeout: Timeout, security: Security, credentials: Any) -> None:
        self.url = url
        self.timeout = timeout
        self._security = security
        self._credentials = credentials
        self._lock = threading.Lock()
        self._line: Line | None = None
        self._closed = False

    def call(self, exchange: Exchange, left: float, headers: Sequence[tuple[str, str]] = ()) -> Call:
        """A try of a request, which may take `left` seconds. It is sent when its events are asked for.

        Raises RuntimeError where the connection was closed.
        """
        return Call(self, self._open(), exchange, left, (*self._security.metadata, *headers))

    def close(self) -> None:
        """Cancel what runs and hang up."""
        with self._lock:
            self._closed = True
            line, self._line = self._line, None
            if line is not None:
                line.channel.close()

    def begin(self, line: Line, method: str, message: Any, **options: Any) -> Any:
        """Begin a call, without waiting for anything. Raises CancelledError where the connection was closed."""
        with self._lock:  # gRPC crashes where one thread begins a call on a channel that another closes
            if self._closed:
                raise CancelledError(f"the client was closed while it was about to ask {self.url}")
            return getattr(line, method)(message, **options)

    def _open(self) -> Line:
        """A channel, made anew where there is none. It connects when it is first used."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed; make another one")
            if self._line is None:
                options = (*CHANNEL_OPTIONS, *self._security.channel_options(self.url))
                self._line = Line(
                    grpc.insecure_channel(self.url, options)
                    if self._credentials is None
                    else grpc.secure_channel(self.url, self._credentials, options)
                )
            return self._line

    def drop_if_lost(self, line: Line, error: Any) -> None:
        """Let the next request connect afresh: a failed channel repeats its old error until its own next attempt."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return
        with self._lock:
            # Not closed, since that would cancel other threads' calls; it goes when the last of them lets go.
            if self._line is line:
                self._line = None


class Line:
    """A channel with the two calls that are made on it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.greet = stub.ServerLive.future
        self.stream = stub.ModelStreamInfer


class Call:
    """One try's stream, read by a thread of its own.

    The caller's thread must not be inside gRPC when Ctrl-C interrupts it: an exception between two instructions of
    gRPC's critical sections leaves its lock taken, and the cancel that should follow waits for that lock forever.
    """

    def __init__(
        self,
        connection: Connection,
        line: Line,
        exchange: Exchange,
        left: float,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self._connection = connection
        self._line = line
        self._exchange = exchange
        self._deadline = time.monotonic() + left
        self._headers = headers
        # An event; or how it ended: the error, or None for well.
        self._received: SimpleQueue[Event | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled = False
        self._begun: Any = None  # the gRPC call that is under way
        #: When anything came last; until the stream is there, the limit is that of the connecting.
        self._heard_at = math.inf

    def events(self) -> Iterator[Event]:
        """Send the request and yield its events. Raises DiffuserveError."""
        message = self._exchange.message()
        threading.Thread(target=self._read, args=(message,), name="diffuserve-stream", daemon=True).start()
        while (received := self._next()) is not None:
            if isinstance(received, BaseException):
                raise received
            yield received

    def cancel(self) -> None:
        """Tell the server to stop, from whichever thread. Does nothing where the request is done."""
        with self._lock:
            self._cancelled = True
            begun = self._begun
        if begun is not None and not self._exchange.finished:
            begun.cancel()

    def _next(self) -> Event | BaseException | None:
        """What comes next. Where nothing came for the stall timeout, that is the error."""
        while True:
            left = self._exchange.stall - max(0.0, time.monotonic() - self._heard_at)
            # No longer at once than the stall timeout itself, which may count from now on, with the first answer.
            wait = min(left, self._connection.timeout.stall)
            with contextlib.suppress(Empty):
                return self._received.get(timeout=max(wait, _AT_LEAST_SECONDS))
            if time.monotonic() - self._heard_at >= self._exchange.stall:
                return self._exchange.stalled()

    def _read(self, message: Any) -> None:
        try:
            self._exchange_all(message)
        except BaseException as error:  # a caller waits: whatever it is, it must hear of it
            self._received.put(error)
        else:
            self._received.put(None)

    def _exchange_all(self, message: Any) -> None:
        self._greet()
        # Before it is begun: it may come at once.
        self._heard_at = time.monotonic()
        left = self._deadline - time.monotonic()
        stream = self._begin("stream", iter((message,)), timeout=left)
        try:
            # To the stream's end, past the last answer: a stream that is cancelled while Triton is about to end it
            # keeps its model from unloading (seen with 2.51).
            for response in stream:
                self._heard_at = time.monotonic()
                self._take(response)
            if not self._exchange.finished:
                raise self._exchange.ended()
        except grpc.RpcError as error:
            if self._exchange.finished:
                return
            self._connection.drop_if_lost(self._line, error)
            raise self._exchange.failure(error.code(), error.details()) from error

    def _begin(self, method: str, message: Any, **options: Any) -> Any:
        with self._lock:
            if self._cancelled:
                raise CancelledError("the request was cancelled before it was sent")
            self._begun = self._connection.begin(self._line, method, message, metadata=self._headers, **options)
            return self._begun

    def _take(self, response: Any) -> None:
        try:
            event = self._exchange.receive(response)
        except DiffuserveError as error:
            if not self._exchange.finished:
                raise
            self._received.put(error)
        else:
            if event is not None:
                self._received.put(event)

    def _greet(self) -> None:
        """Find out soon whether a server is there.

        A stream's only limit is its deadline, and gRPC tries to connect to a silent address for 20 s; this call costs
        one round trip (0.7 ms on loopback).
        """
        url, timeout = self._connection.url, self._connection.timeout
        limit = min(timeout.connect, max(0.0, self._deadline - time.monotonic()))
        try:
            self._begin("greet", service_pb2.ServerLiveRequest(), timeout=limit).result()
        except grpc.FutureCancelledError as error:
            raise connect_failure(grpc.StatusCode.CANCELLED, None, url=url, timeout=timeout) from error
        except grpc.RpcError as error:
            self._connection.drop_if_lost(self._line, error)
            raise connect_failure(error.code(), error.details(), url=url, timeout=timeout) from error
