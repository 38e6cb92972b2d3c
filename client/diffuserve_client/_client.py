"""The synchronous client."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, overload

from diffuserve.errors import CancelledError, DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._deployed import Checkpoint, Health, checkpoints_of, health_of
from diffuserve_client._events import PictureEvent
from diffuserve_client._many import Gathering, Outcome
from diffuserve_client._parameters import GenerateParameters, ResumeParameters, request_from
from diffuserve_client._results import GenerateResult
from diffuserve_client._retry import Retry
from diffuserve_client._security import Tls, trace_headers
from diffuserve_client._session import DEFAULT_URL, Collector, Session
from diffuserve_client._timeout import Timeout

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, Unpack

    from diffuserve_client._connection import Call
    from diffuserve_client._delivery import Delivery

__all__ = ["DEFAULT_URL", "Client"]


class Client:
    """Connections to one server or several, each at host:port of its gRPC port.

    Of several servers a request goes to the one with the least work that answers; where a server is lost, shuts down
    or is full, `retry` says how often it is tried again, there or elsewhere.

    Threads may share a client: each request has a stream of its own. It is a context manager; `close` cancels what
    runs. AsyncClient is the same for asyncio.

    Raises InvalidArgumentError for addresses, timeouts or credentials that cannot be meant.
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
        """`timeout`: a Timeout, or the seconds that a request may take in all, its retries included.

        `token` is sent as a bearer token and `headers` as they are, with every call; a token goes over TLS, or over
        loopback. gRPC reads a proxy from the environment (`http_proxy`, `no_proxy`), which is not for loopback.
        """
        self._session = Session(url, timeout=timeout, retry=retry, tls=tls, token=token, headers=headers)
        from diffuserve_client._connection import Connection

        security = self._session.security
        credentials = security.credentials()
        self._connections = {
            one: Connection(one, self._session.timeout, security, credentials) for one in self._session.urls
        }
        self._lock = threading.Lock()
        self._running: dict[str, _Run] = {}

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

    def generate(
        self,
        prompt: str | GenerateRequest,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        request_id: str | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> GenerateResult:
        """Make a request's pictures and wait for them.

        The request is a prompt and GenerateRequest's other fields as keywords, or a GenerateRequest alone.
        `on_progress` is called in this thread with each progress event: of every step, unless `progress_every` says
        otherwise; `on_preview` with each preview, whose `image` is small, unless `preview_every` says otherwise. Where
        one raises, and on Ctrl-C, the request is cancelled on the server. `request_id` is its name in the server's log
        and for `cancel`; one is drawn otherwise.

        Raises DiffuserveError; among them ConnectionFailedError, DeadlineError, InvalidArgumentError. One whose detail
        has a `snapshot` tells of a server that was shut down meanwhile, where the client may not try again, or tried
        in vain: `resume` goes on from it, and the pictures that were done by then are its detail `images`.
        """
        request = request_from(
            prompt,
            parameters,
            wants_progress=on_progress is not None,
            wants_previews=on_preview is not None,
        )
        return self._run(request, request_id).collect(Collector(on_progress, on_preview))

    def resume(
        self,
        snapshot: bytes,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        request_id: str | None = None,
        **parameters: Unpack[ResumeParameters],
    ) -> GenerateResult:
        """Go on with a request that another server, which was shut down, ended with a snapshot.

        The pictures that were left are made as they would have been there. Raises what `generate` raises;
        InvalidArgumentError for a snapshot of another export, of another release, or signed with another key.
        """
        request = GenerateRequest(prompt="", resume=snapshot, **parameters)
        return self.generate(request, on_progress=on_progress, on_preview=on_preview, request_id=request_id)

    def stream(
        self,
        prompt: str | GenerateRequest,
        *,
        request_id: str | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Generator[Event, None, None]:
        """Every event of a request as it comes, each of its kind's class: QueuedEvent, ProgressEvent, PreviewEvent,
        ImageEvent, SnapshotEvent.

        The request is given as to `generate`; `progress_every` and `preview_every` say which events it wants.
        Each image comes once, however often the request is tried. It is sent when the first event is asked for.
        Closing the iterator cancels it on the server; use `contextlib.closing` around a loop that may be left early.

        Raises what `generate` raises.
        """
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
    ) -> Generator[GenerateResult, None, None]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        concurrency: int = ...,
        in_order: bool = ...,
        return_errors: bool,
        on_event: Callable[[int, Event], None] | None = ...,
    ) -> Generator[GenerateResult | DiffuserveError, None, None]: ...

    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        concurrency: int = 16,
        in_order: bool = True,
        return_errors: bool = False,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> Generator[GenerateResult | DiffuserveError, None, None]:
        """The results of many requests, `concurrency` of which are under way at a time.

        They come in the order of the requests, or with `in_order=False` as they are done; `result.index` says whose it
        is. `requests` is read as it is needed, and may be endless. `on_event` is called with the index and each event,
        in several threads. The first error is raised and cancels the rest, as does leaving the loop (use
        `contextlib.closing`) and Ctrl-C; with `return_errors` a request's error is yielded in its place, its index in
        `error.detail["index"]`.

        Raises what `generate` raises; InvalidArgumentError for a concurrency below 1 or above 1,024.
        """
        gathering = Gathering(requests, concurrency=concurrency, in_order=in_order, return_errors=return_errors)
        return self._gather(gathering, concurrency, on_event)

    def _gather(
        self, gathering: Gathering, concurrency: int, on_event: Callable[[int, Event], None] | None
    ) -> Generator[GenerateResult | DiffuserveError, None, None]:
        ended: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        runs: dict[int, _Run] = {}

        def one(index: int, run: _Run) -> None:
            hear = None if on_event is None else lambda event: on_event(index, event)
            try:
                ended.put((index, run.collect(Collector(), index, hear)))
            except BaseException as error:  # whoever waits must hear of it, whatever it is
                ended.put((index, error))

        with ThreadPoolExecutor(concurrency, thread_name_prefix="diffuserve-many") as pool:
            try:
                while True:
                    for index, request in gathering.to_send():
                        runs[index] = self._run(request, None)
                        # Each in a copy of this context, where the trace is that it belongs to.
                        pool.submit(contextvars.copy_context().run, one, index, runs[index])
                    outcome = gathering.next_outcome()
                    if outcome is not None:
                        yield outcome
                    elif gathering.is_over:
                        return
                    # What ended while the caller was busy makes room for others; else there is nothing but to wait.
                    must_wait = outcome is None
                    while must_wait or not ended.empty():
                        index, result = ended.get()
                        del runs[index]
                        gathering.done(index, result)
                        must_wait = False
            finally:
                for run in runs.values():
                    run.cancel()

    def cancel(self, request_id: str) -> bool:
        """End a request of this client's, from any thread: it raises CancelledError there, and the server stops.

        False where none of that name is under way here.
        """
        with self._lock:
            run = self._running.get(request_id)
        if run is None:
            return False
        run.cancel()
        return True

    def status(self) -> dict[str, Any]:
        """What the first server that answers is doing, and its checkpoints: docs/operations.md says what is in it.

        Raises DiffuserveError; among them ConnectionFailedError.
        """
        errors, headers = [], trace_headers()
        for url in self.urls:
            try:
                return self._status(url, headers)
            except DiffuserveError as error:
                errors.append(error)
        raise errors[0]

    def models(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of the first server that answers: what each takes, and whether it is in memory.

        Raises DiffuserveError; among them ConnectionFailedError.
        """
        return checkpoints_of(self.status())

    def health(self) -> tuple[Health, ...]:
        """How each server is, in the order of the addresses. A server that cannot be asked is no error, but told."""

        def ask(url: str) -> Health:
            started = time.monotonic()
            try:
                return health_of(url, self._status(url, headers), time.monotonic() - started)
            except DiffuserveError as error:
                return health_of(url, error, time.monotonic() - started)

        headers = trace_headers()  # other threads do not have this one's trace
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return tuple(pool.map(ask, self.urls))

    def _status(self, url: str, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
        from diffuserve_client._exchange import StatusExchange

        exchange = StatusExchange(url=url, timeout=self.timeout)
        call = self._connections[url].call(exchange, self.timeout.total, headers)
        try:
            (event,) = [one for one in call.events() if one.kind == "status"]  # to the stream's end
            return dict(event.info)
        finally:
            call.cancel()

    def _run(self, request: GenerateRequest, request_id: str | None) -> _Run:
        return _Run(self, self._session.delivery(request, request_id))

    def close(self) -> None:
        """Hang up. Requests that run in other threads raise CancelledError; later ones RuntimeError."""
        with self._lock:
            running = tuple(self._running.values())
        for run in running:
            run.cancel()
        for connection in self._connections.values():
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Run:
    """A request under way: its tries, one after another, and the way to end them from another thread."""

    def __init__(self, client: Client, delivery: Delivery) -> None:
        self._client = client
        self._delivery = delivery
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._call: Call | None = None

    def collect(
        self, collector: Collector, index: int = 0, on_event: Callable[[Event], None] | None = None
    ) -> GenerateResult:
        """Wait for the result. Raises DiffuserveError."""
        delivery = self._delivery
        try:
            with closing(self.events()) as events:
                for event in events:
                    collector.take(event)
                    if on_event is not None:
                        on_event(event)
        except DiffuserveError as error:
            collector.tell_done(error, delivery.request)
            raise
        return collector.result(delivery.request, delivery.request_id, index)

    def events(self) -> Generator[Event, None, None]:
        """Raises DiffuserveError, RuntimeError where the client was closed."""
        client, name = self._client, self._delivery.request_id
        with client._lock:
            if name in client._running:
                raise RuntimeError(f"a request {name!r} of this client is under way; give each an id of its own")
            client._running[name] = self
        try:
            headers = trace_headers()
            while not self._delivery.is_done:
                yield from self._try(headers)
        finally:
            with client._lock:
                del client._running[name]

    def _try(self, headers: Sequence[tuple[str, str]]) -> Iterator[Event]:
        delivery = self._delivery
        self._pause(delivery.wait())
        attempt = delivery.attempt()
        call = None
        try:
            call = self._begin(self._client._connections[attempt.url].call(attempt.exchange, delivery.left, headers))
            for event in call.events():
                taken = delivery.take(event)
                if taken is not None:
                    yield taken
        except DiffuserveError as error:
            delivery.failed(error)
        else:
            delivery.ended(handed_over=attempt.exchange.is_handed_over)
        finally:
            if call is not None:
                call.cancel()  # does nothing where the call is over
            delivery.release()

    def _begin(self, call: Call) -> Call:
        with self._lock:
            self._call = call
        if self._stopped.is_set():
            raise _cancelled()
        return call

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds) if seconds else self._stopped.is_set():
            raise _cancelled()

    def cancel(self) -> None:
        self._stopped.set()
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()


def _cancelled() -> CancelledError:
    return CancelledError("the request was cancelled by the client")
