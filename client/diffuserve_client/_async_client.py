"""The asynchronous client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, overload

from diffuserve.errors import CancelledError, DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._deployed import Checkpoint, Health, checkpoints_of, health_of
from diffuserve_client._events import PictureEvent
from diffuserve_client._many import Gathering
from diffuserve_client._parameters import GenerateParameters, ResumeParameters, request_from
from diffuserve_client._results import GenerateResult
from diffuserve_client._retry import Retry
from diffuserve_client._security import Tls, trace_headers
from diffuserve_client._session import DEFAULT_URL, Collector, Session
from diffuserve_client._timeout import Timeout

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, Unpack

    from diffuserve_client._async_connection import AsyncCall, AsyncConnection
    from diffuserve_client._delivery import Delivery

__all__ = ["AsyncClient"]


class AsyncClient:
    """Client for asyncio: the same arguments, methods, results and errors, to be used in one event loop.

    Where a task that waits for a request is cancelled, the request is cancelled on the server. It is an asynchronous
    context manager; `aclose` cancels what runs.
    """

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout: Timeout | float | None = None,
        retry: Retry | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """As of Client."""
        self._session = Session(url, timeout=timeout, retry=retry, tls=tls, token=token, headers=headers)
        self._credentials = self._session.security.credentials()
        self._connections: dict[str, AsyncConnection] = {}
        self._running: dict[str, _Run] = {}
        self._closed = False

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return self._session.urls

    @property
    def timeout(self) -> Timeout:
        return self._session.timeout

    @property
    def retry(self) -> Retry:
        return self._session.retry

    async def generate(
        self,
        prompt: str | GenerateRequest,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        request_id: str | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> GenerateResult:
        """As Client.generate."""
        request = request_from(
            prompt,
            parameters,
            wants_progress=on_progress is not None,
            wants_previews=on_preview is not None,
        )
        return await self._run(request, request_id).collect(Collector(on_progress, on_preview))

    async def resume(
        self,
        snapshot: bytes,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        request_id: str | None = None,
        **parameters: Unpack[ResumeParameters],
    ) -> GenerateResult:
        """As Client.resume."""
        request = GenerateRequest(prompt="", resume=snapshot, **parameters)
        return await self.generate(request, on_progress=on_progress, on_preview=on_preview, request_id=request_id)

    def stream(
        self,
        prompt: str | GenerateRequest,
        *,
        request_id: str | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> AsyncGenerator[Event, None]:
        """As Client.stream; use `contextlib.aclosing` around a loop that may be left early."""
        request = request_from(prompt, parameters, wants_progress=False)
        return self._run(request, request_id).events()

    @overload
    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        concurrency: int = ...,
        in_order: bool = ...,
        return_errors: Literal[False] = ...,
        on_event: Callable[[int, Event], None] | None = ...,
    ) -> AsyncGenerator[GenerateResult, None]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        concurrency: int = ...,
        in_order: bool = ...,
        return_errors: bool,
        on_event: Callable[[int, Event], None] | None = ...,
    ) -> AsyncGenerator[GenerateResult | DiffuserveError, None]: ...

    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        concurrency: int = 16,
        in_order: bool = True,
        return_errors: bool = False,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> AsyncGenerator[GenerateResult | DiffuserveError, None]:
        """As Client.generate_many; `on_event` is called in the event loop's thread."""
        gathering = Gathering(requests, concurrency=concurrency, in_order=in_order, return_errors=return_errors)
        return self._gather(gathering, on_event)

    async def _gather(
        self, gathering: Gathering, on_event: Callable[[int, Event], None] | None
    ) -> AsyncGenerator[GenerateResult | DiffuserveError, None]:
        tasks: dict[asyncio.Task[GenerateResult], int] = {}

        def begin(index: int, request: GenerateRequest) -> None:
            hear = None if on_event is None else lambda event: on_event(index, event)
            tasks[asyncio.create_task(self._run(request, None).collect(Collector(), index, hear))] = index

        try:
            while True:
                for index, request in gathering.to_send():
                    begin(index, request)
                outcome = gathering.next_outcome()
                if outcome is not None:
                    yield outcome
                elif gathering.is_over:
                    return
                else:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in [one for one in tasks if one.done()]:
                    error = task.exception()
                    gathering.done(tasks.pop(task), task.result() if error is None else error)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def cancel(self, request_id: str) -> bool:
        """As Client.cancel, from the event loop's thread."""
        run = self._running.get(request_id)
        if run is None:
            return False
        run.cancel()
        return True

    async def status(self) -> dict[str, Any]:
        """As Client.status."""
        errors = []
        for url in self.urls:
            try:
                return await self._status(url)
            except DiffuserveError as error:
                errors.append(error)
        raise errors[0]

    async def models(self) -> tuple[Checkpoint, ...]:
        """As Client.models."""
        return checkpoints_of(await self.status())

    async def health(self) -> tuple[Health, ...]:
        """As Client.health."""

        async def ask(url: str) -> Health:
            started = time.monotonic()
            try:
                return health_of(url, await self._status(url), time.monotonic() - started)
            except DiffuserveError as error:
                return health_of(url, error, time.monotonic() - started)

        return tuple(await asyncio.gather(*(ask(url) for url in self.urls)))

    async def _status(self, url: str) -> dict[str, Any]:
        from diffuserve_client._exchange import StatusExchange

        exchange = StatusExchange(url=url, timeout=self.timeout)
        call = self._connection(url).call(exchange, self.timeout.total, trace_headers())
        async with aclosing(call.events()) as events:
            (event,) = [event async for event in events if event.kind == "status"]  # to the stream's end
            return dict(event.info)

    def _run(self, request: GenerateRequest, request_id: str | None) -> _Run:
        return _Run(self, self._session.delivery(request, request_id))

    def _connection(self, url: str) -> AsyncConnection:
        """The connection to a server, made in the event loop that uses it."""
        from diffuserve_client._async_connection import AsyncConnection

        if self._closed:
            raise RuntimeError("the client is closed; make another one")
        if url not in self._connections:
            session = self._session
            self._connections[url] = AsyncConnection(url, session.timeout, session.security, self._credentials)
        return self._connections[url]

    async def aclose(self) -> None:
        """Hang up. Requests of other tasks raise CancelledError; later ones RuntimeError."""
        self._closed = True
        for run in tuple(self._running.values()):
            run.cancel()
        for connection in self._connections.values():
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class _Run:
    """A request under way: its tries, one after another, and the way to end them from another task."""

    def __init__(self, client: AsyncClient, delivery: Delivery) -> None:
        self._client = client
        self._delivery = delivery
        self._stopped = asyncio.Event()
        self._call: AsyncCall | None = None

    async def collect(
        self, collector: Collector, index: int = 0, on_event: Callable[[Event], None] | None = None
    ) -> GenerateResult:
        """Wait for the result. Raises DiffuserveError."""
        delivery = self._delivery
        try:
            async with aclosing(self.events()) as events:
                async for event in events:
                    collector.take(event)
                    if on_event is not None:
                        on_event(event)
        except DiffuserveError as error:
            collector.tell_done(error, delivery.request)
            raise
        return collector.result(delivery.request, delivery.request_id, index)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Raises DiffuserveError, RuntimeError where the client was closed."""
        running, name = self._client._running, self._delivery.request_id
        if name in running:
            raise RuntimeError(f"a request {name!r} of this client is under way; give each an id of its own")
        running[name] = self
        try:
            headers = trace_headers()
            while not self._delivery.is_done:
                async with aclosing(self._try(headers)) as events:
                    async for event in events:
                        yield event
        finally:
            del running[name]

    async def _try(self, headers: Sequence[tuple[str, str]]) -> AsyncGenerator[Event, None]:
        delivery = self._delivery
        await self._pause(delivery.wait())
        attempt = delivery.attempt()
        try:
            connection = self._client._connection(attempt.url)
            self._call = connection.call(attempt.exchange, delivery.left, headers)
            async with aclosing(self._call.events()) as events:
                async for event in events:
                    taken = delivery.take(event)
                    if taken is not None:
                        yield taken
        except DiffuserveError as error:
            delivery.failed(error)
        else:
            delivery.ended(handed_over=attempt.exchange.is_handed_over)
        finally:
            delivery.release()

    async def _pause(self, seconds: float) -> None:
        if seconds:
            try:
                await asyncio.wait_for(self._stopped.wait(), seconds)
            except TimeoutError:
                return
        if self._stopped.is_set():
            raise CancelledError("the request was cancelled by the client")

    def cancel(self) -> None:
        self._stopped.set()
        if self._call is not None:
            self._call.cancel()
