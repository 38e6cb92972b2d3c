"""The synchronous way to the server: one gRPC channel, one stream per request.

Over the generated stubs and not tritonclient's `start_stream`: that one holds a single stream per client, while the
stubs give each request a stream of its own on one shared connection, with a deadline, a cancel and a status.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Generator, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from diffuserve.errors import DiffuserveError
from diffuserve.request import Event
from diffuserve_client._exchange import CHANNEL_OPTIONS, Exchange, connect_failure
from diffuserve_client._timeout import Timeout

__all__ = ["Connection"]

_AT_LEAST_SECONDS: Final = 0.1  # a process that was stopped itself must first read what came meanwhile


class Connection:
    """A channel that many threads may use at once."""

    def __init__(self, url: str, timeout: Timeout) -> None:
        self.url = url
        self.timeout = timeout
        self._lock = threading.Lock()
        self._channel: Any = None
        self._closed = False

    def run(self, exchange: Exchange) -> Generator[Event, None, None]:
        """Send the request and yield its events. However this ends, the server is told to stop what is not done.

        Raises DiffuserveError, or RuntimeError where the connection was closed.
        """
        call = _Call(self, self.open(), exchange)
        try:
            yield from call.events()
        finally:
            call.cancel()  # does nothing where the call is over

    def close(self) -> None:
        """Cancel what runs and hang up."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def open(self) -> Any:
        """The channel, made anew where there is none. It connects when it is first used."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed; make another one")
            if self._channel is None:
                self._channel = grpc.insecure_channel(self.url, options=CHANNEL_OPTIONS)
            return self._channel

    def drop_if_lost(self, channel: Any, error: Any) -> None:
        """Let the next request connect afresh: a failed channel repeats its old error until its own next attempt."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return
        with self._lock:
            # Not closed, since that would cancel other threads' calls; it goes when the last of them lets go.
            if self._channel is channel:
                self._channel = None


class _Call:
    """One request's stream, read by a thread of its own.

    The caller's thread must not be inside gRPC when Ctrl-C interrupts it: an exception between two instructions of
    gRPC's critical sections leaves its lock taken, and the cancel that should follow waits for that lock forever.
    """

    def __init__(self, connection: Connection, channel: Any, exchange: Exchange) -> None:
        self._connection = connection
        self._channel = channel
        self._exchange = exchange
        # An event; or how it ended: the error, or None for well.
        self._received: SimpleQueue[Event | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled = False
        self._stream: Any = None
        #: When anything came last; until the stream is there, the limit is that of the connecting.
        self._heard_at = math.inf

    def events(self) -> Iterator[Event]:
        message = self._exchange.message()
        threading.Thread(target=self._read, args=(message,), name="diffuserve-stream", daemon=True).start()
        while (received := self._next()) is not None:
            if isinstance(received, BaseException):
                raise received
            yield received

    def _next(self) -> Event | BaseException | None:
        """What comes next. Where nothing came for the stall timeout, that is the error."""
        stall = self._connection.timeout.stall
        while True:
            left = stall - max(0.0, time.monotonic() - self._heard_at)
            with contextlib.suppress(Empty):
                return self._received.get(timeout=max(left, _AT_LEAST_SECONDS))
            if time.monotonic() - self._heard_at >= stall:
                return self._exchange.stalled()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            stream = self._stream
        if stream is not None and not self._exchange.finished:
            stream.cancel()

    def _read(self, message: Any) -> None:
        try:
            self._exchange_all(message)
        except BaseException as error:  # a caller waits: whatever it is, it must hear of it
            self._received.put(error)
        else:
            self._received.put(None)

    def _exchange_all(self, message: Any) -> None:
        deadline = time.monotonic() + self._connection.timeout.total
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._greet(stub)
        with self._lock:
            if self._cancelled:
                return
            self._heard_at = time.monotonic()
            self._stream = stub.ModelStreamInfer(iter((message,)), timeout=deadline - time.monotonic())
        try:
            # To the stream's end, past the last answer: a stream that is cancelled while Triton is about to end it
            # keeps its model from unloading (seen with 2.51).
            for response in self._stream:
                self._heard_at = time.monotonic()
                self._take(response)
            if not self._exchange.finished:
                raise self._exchange.ended()
        except grpc.RpcError as error:
            if self._exchange.finished:
                return
            self._connection.drop_if_lost(self._channel, error)
            raise self._exchange.failure(error.code(), error.details()) from error

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

    def _greet(self, stub: Any) -> None:
        """Find out soon whether a server is there.

        A stream's only limit is its deadline, and gRPC tries to connect to a silent address for 20 s; this call costs
        one round trip (0.7 ms on loopback).
        """
        url, timeout = self._connection.url, self._connection.timeout
        try:
            stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=min(timeout.connect, timeout.total))
        except grpc.RpcError as error:
            self._connection.drop_if_lost(self._channel, error)
            raise connect_failure(error.code(), error.details(), url=url, timeout=timeout) from error
