"""The asynchronous way to a server: one gRPC channel of grpc.aio, one stream per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from diffuserve.errors import DiffuserveError
from diffuserve.request import Event
from diffuserve_client._exchange import CHANNEL_OPTIONS, Exchange, connect_failure
from diffuserve_client._security import Security
from diffuserve_client._timeout import Timeout

__all__ = ["AsyncCall", "AsyncConnection"]


class AsyncConnection:
    """A channel to one server, for the tasks of one event loop."""

    def __init__(self, url: str, timeout: Timeout, security: Security, credentials: Any) -> None:
        self.url = url
        self.timeout = timeout
        self._security = security
        self._credentials = credentials
        self._channel: Any = None
        self._closed = False

    def call(self, exchange: Exchange, left: float, headers: Sequence[tuple[str, str]] = ()) -> AsyncCall:
        """A try of a request, which may take `left` seconds. It is sent when its events are asked for."""
        return AsyncCall(self, exchange, left, (*self._security.metadata, *headers))

    async def close(self) -> None:
        """Cancel what runs and hang up."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def open(self) -> Any:
        """As Connection.open. Raises RuntimeError where the connection was closed."""
        if self._closed:
            raise RuntimeError("the client is closed; make another one")
        if self._channel is None:
            options = (*CHANNEL_OPTIONS, *self._security.channel_options(self.url))
            self._channel = (
                grpc.aio.insecure_channel(self.url, options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.url, self._credentials, options)
            )
        return self._channel

    def drop_if_lost(self, channel: Any, error: Any) -> None:
        """As Connection.drop_if_lost."""
        if error.code() is grpc.StatusCode.UNAVAILABLE and self._channel is channel:
            self._channel = None


class AsyncCall:
    """One try's stream."""

    def __init__(
        self, connection: AsyncConnection, exchange: Exchange, left: float, headers: Sequence[tuple[str, str]]
    ) -> None:
        self._connection = connection
        self._exchange = exchange
        self._deadline = time.monotonic() + left
        self._headers = headers
        self._cancelled = False
        self._call: Any = None

    async def events(self) -> AsyncGenerator[Event, None]:
        """Send the request and yield its events.

        However this ends, the server is told to stop what is not done. Raises DiffuserveError.
        """
        message = self._exchange.message()
        channel = self._connection.open()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            await self._greet(stub, channel)
            self._check_cancelled()
            self._call = stub.ModelStreamInfer(_only(message), timeout=self._left, metadata=self._headers)
            # To the stream's end, past the last answer: see Call.
            while (response := await self._next()) is not grpc.aio.EOF:
                event = self._exchange.receive(response)
                if event is not None:
                    yield event
            if not self._exchange.finished:
                raise self._exchange.ended()
        except grpc.aio.AioRpcError as error:
            if not self._exchange.finished:
                self._connection.drop_if_lost(channel, error)
                raise self._exchange.failure(error.code(), error.details()) from error
        except DiffuserveError:
            if self._exchange.finished:
                await self._drain()
            raise
        finally:
            if self._call is not None and not self._exchange.finished:
                self._call.cancel()

    def cancel(self) -> None:
        """Tell the server to stop. Does nothing where the request is done."""
        if self._exchange.finished:
            return
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    @property
    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise self._exchange.failure(grpc.StatusCode.CANCELLED, "by the client")

    async def _next(self) -> Any:
        """What comes next. Raises the error of a silent server where nothing comes for the stall timeout."""
        try:
            return await self._within(self._exchange.stall, self._call.read())
        except TimeoutError as error:
            raise self._exchange.stalled() from error

    async def _drain(self) -> None:
        """Let a stream whose last word came end by itself."""
        try:
            while await self._within(self._connection.timeout.connect, self._call.read()) is not grpc.aio.EOF:
                pass
        except (TimeoutError, grpc.aio.AioRpcError, DiffuserveError):
            pass

    async def _within(self, seconds: float | None, answer: Awaitable[Any]) -> Any:
        """What gRPC answers. Raises TimeoutError, and CancelledError where the call is cancelled meanwhile.

        Unlike asyncio.wait_for, it neither forgets that the task is cancelled while an answer comes (before Python
        3.12), nor takes the end of the call, as of a client that is closed, for that of the task.
        """
        waiting = asyncio.ensure_future(answer)
        try:
            await asyncio.wait((waiting,), timeout=seconds)
        finally:
            if not waiting.done():
                waiting.cancel()  # and with it the call
        if not waiting.done():
            raise TimeoutError
        if waiting.cancelled():
            raise self._exchange.failure(grpc.StatusCode.CANCELLED, "by the client")
        return waiting.result()

    async def _greet(self, stub: Any, channel: Any) -> None:
        """As Call._greet."""
        url, timeout = self._connection.url, self._connection.timeout
        limit = min(timeout.connect, self._left)
        self._call = stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=limit, metadata=self._headers)
        try:
            # gRPC keeps the limit: a second clock might be the faster one, and say nothing of what it waited for.
            await self._within(None, self._call)
        except grpc.aio.AioRpcError as error:
            self._connection.drop_if_lost(channel, error)
            raise connect_failure(error.code(), error.details(), url=url, timeout=timeout) from error


async def _only(message: Any) -> AsyncIterator[Any]:
    yield message
