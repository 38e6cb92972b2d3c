"""Keep a load up, and record what became of each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from diffuserve.errors import DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._bench.load import ClosedLoop, Extent, Load, OpenLoop, poisson_arrivals
from diffuserve_client._bench.record import INTERRUPTED, Record, Run

__all__ = ["Streams", "run_load"]


class Streams(Protocol):
    """What a load is sent with: an AsyncClient that does not try again, or a test's."""

    def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]: ...


async def run_load(
    client: Streams,
    load: Load,
    extent: Extent,
    requests: Iterator[GenerateRequest],
    *,
    seed: int,
    stop: asyncio.Event,
    on_record: Callable[[Record], None] | None = None,
) -> Run:
    """Send `requests`, which must not run out, until the extent is measured and every request has ended, or `stop`.

    The latter cancels what is under way. `on_record` is called with each record when it is whole. Times are the event
    loop's. Errors of requests are recorded; any other is raised.
    """
    driver = _Driver(client, load, extent, requests, on_record)
    sending = driver.send_arrivals(load.rate, seed) if isinstance(load, OpenLoop) else driver.send_closed(load)
    interrupted = not await _unless(stop, sending)
    return driver.run(interrupted=interrupted)


async def _unless(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Whether the work came to its end; else it was cancelled, since `stop` was set."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        await _cancel((working, stopping))


class _Driver:
    """A run under way."""

    def __init__(
        self,
        client: Streams,
        load: Load,
        extent: Extent,
        requests: Iterator[GenerateRequest],
        on_record: Callable[[Record], None] | None,
    ) -> None:
        self._client = client
        self._load = load
        self._extent = extent
        self._requests = requests
        self._on_record = on_record
        self._zero = asyncio.get_running_loop().time()
        self._begin: float | None = None
        self._sent = 0
        self._records: dict[int, Record] = {}

    async def send_closed(self, load: ClosedLoop) -> None:
        async def caller() -> None:
            while not self._is_enough(now := self._now()):
                await self._send(now)

        await _all([asyncio.ensure_future(caller()) for _ in range(load.concurrency)])

    async def send_arrivals(self, rate: float, seed: int) -> None:
        """Each at its time, whatever is under way: a server that stalls is not spared what comes meanwhile."""
        sent: list[asyncio.Future[None]] = []
        try:
            for arrival in poisson_arrivals(rate, seed):
                if self._is_enough(arrival):
                    break
                await asyncio.sleep(max(0.0, arrival - self._now()))
                sent.append(asyncio.ensure_future(self._send(arrival)))
            await asyncio.gather(*sent)
        finally:
            await _cancel(sent)

    def _is_enough(self, arrival: float) -> bool:
        """Whether a request that arrives then is one too many. The window begins with the first one that counts."""
        extent = self._extent
        if self._sent < extent.warm_up:
            return False
        if self._begin is None:
            self._begin = arrival
        if extent.requests is not None:
            return self._sent >= extent.warm_up + extent.requests
        return extent.seconds is not None and arrival >= self._begin + extent.seconds

    def _send(self, arrived: float) -> Awaitable[None]:
        """Take the next request, and return what sends it."""
        index, request = self._sent, next(self._requests)
        self._sent += 1
        record = Record.begun(
            index, request, warm_up=index < self._extent.warm_up, arrived=arrived, sent=max(arrived, self._now())
        )
        self._records[index] = record
        return self._exchange(request, record)

    async def _exchange(self, request: GenerateRequest, record: Record) -> None:
        try:
            async with aclosing(self._client.stream(request)) as events:
                async for event in events:
                    record = record.heard(event, self._now())
                    self._records[record.index] = record
            record = record.ended(self._now())
        except DiffuserveError as error:
            record = record.ended(self._now(), error)
        self._records[record.index] = record
        if self._on_record is not None:
            self._on_record(record)

    def run(self, *, interrupted: bool) -> Run:
        """What was measured; what is under way by now was interrupted."""
        now = self._now()
        begin = now if self._begin is None else self._begin
        records = [one if one.done is not None else replace(one, error=INTERRUPTED) for one in self._records.values()]
        if self._extent.seconds is not None:
            end = begin + self._extent.seconds
        else:
            end = max((one.done for one in records if one.done is not None and not one.warm_up), default=begin)
        if interrupted:
            end = now if self._extent.seconds is None else min(now, end)
        return Run(self._load, begin, end, interrupted, records)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._zero


async def _all(tasks: list[asyncio.Future[None]]) -> None:
    """Wait for all of them. Where one fails, or this is cancelled, the others are cancelled."""
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
