"""Loads on a server whose delays are known, in virtual time: the figures must be those."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import repeat

import numpy as np
import pytest

from diffuserve.errors import DeadlineError, QueueFullError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._bench.figures import Figures, figures_of
from diffuserve_client._bench.load import ClosedLoop, Extent, Load, OpenLoop, poisson_arrivals
from diffuserve_client._bench.record import INTERRUPTED, Record, Run
from diffuserve_client._bench.run import run_load
from unit.client.bench import virtual_time

REQUEST = GenerateRequest(prompt="a", steps=4)


class Server:
    """`workers` requests at once take `seconds(now)` each, the others wait in their order; `cancelled` counts."""

    def __init__(self, seconds: Callable[[float], float], workers: int = 1) -> None:
        self.seconds = seconds
        self.room = asyncio.Semaphore(workers)
        self.now = asyncio.get_running_loop().time
        self.cancelled = 0
        self.most_at_once = self.at_once = 0

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        came = self.now()
        try:
            yield Event(kind="queued", info={"eta_ms": 500})
            async with self.room:
                started = self.now()
                seconds = self.seconds(started)
                await asyncio.sleep(seconds / 2)
                yield Event(kind="progress", step=2, steps=4, info={})
                yield Event(kind="preview", step=2, steps=4, info={})
                await asyncio.sleep(seconds / 2)
            times = {"queued_s": started - came, "run_s": seconds, "eta_s": 0.5, "steps": 4}
            yield Event(kind="image", step=4, steps=4, info=times)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.at_once -= 1


def measured(
    load: Load,
    extent: Extent,
    seconds: Callable[[float], float],
    *,
    workers: int = 1,
    requests: Iterator[GenerateRequest] | None = None,
    stop_at: float | None = None,
) -> tuple[Run, Server]:
    async def work() -> tuple[Run, Server]:
        server, stop = Server(seconds, workers), asyncio.Event()
        if stop_at is not None:
            asyncio.get_running_loop().call_later(stop_at, stop.set)
        return await run_load(server, load, extent, requests or repeat(REQUEST), seed=1, stop=stop), server

    return virtual_time.run(work())


def figures(load: Load, extent: Extent, seconds: Callable[[float], float], *, workers: int = 1) -> Figures:
    return figures_of(measured(load, extent, seconds, workers=workers)[0])


def test_a_closed_loop_keeps_so_many_at_once_and_tells_their_delays() -> None:
    run, server = measured(ClosedLoop(4), Extent(requests=40, warm_up=4), lambda _: 0.1, workers=2)
    assert server.most_at_once == 4
    told = figures_of(run)
    assert (told.requests, told.done, told.errors, told.interrupted) == (40, 40, {}, 0)
    assert told.latency is not None
    assert told.queue is not None
    assert told.first_step is not None
    assert (told.latency.p50, told.latency.p99) == pytest.approx((0.2, 0.2))  # two of four wait for the other two
    assert told.queue.p50 == pytest.approx(0.1)
    assert told.first_step.max == pytest.approx(0.15)
    assert told.first_preview == told.first_step
    assert told.images_per_s == pytest.approx(20.0, rel=0.01)
    assert told.image_steps_per_s == pytest.approx(80.0, rel=0.01)
    assert told.lag is not None
    assert told.lag.max == 0
    assert told.eta_error is not None
    assert told.eta_error.bias == pytest.approx(0.5 / 0.2 - 1)


def test_warm_up_is_not_in_the_figures() -> None:
    """The first eight are slow: a cold server."""
    begun = iter([5.0] * 8)
    told = figures(ClosedLoop(1), Extent(requests=20, warm_up=8), lambda _: next(begun, 0.1))
    assert told.latency is not None
    assert told.latency.max == pytest.approx(0.1)
    assert told.requests == 20
    assert told.images_per_s == pytest.approx(10.0)


def test_a_duration_ends_the_sending_and_waits_for_what_was_sent() -> None:
    run, _ = measured(ClosedLoop(2), Extent(seconds=10, warm_up=2), lambda _: 0.3, workers=2)
    told = figures_of(run)
    assert told.seconds == 10
    assert max(one.sent for one in run.records) < run.end
    assert max(one.done or 0 for one in run.records) > run.end
    assert told.done == told.requests
    # What was under way at the window's begin is counted, what is at its end is not: so the rate is the server's.
    assert told.images_per_s == pytest.approx(2 / 0.3, rel=0.02)


def test_an_open_loop_sends_at_the_arrivals_whatever_is_under_way() -> None:
    run, server = measured(OpenLoop(50), Extent(requests=200), lambda _: 3.0, workers=1000)
    arrivals = poisson_arrivals(50, seed=1)
    assert [one.sent for one in run.records] == pytest.approx([next(arrivals) for _ in range(200)])
    assert server.most_at_once > 100
    told = figures_of(run)
    assert told.latency is not None
    assert told.latency.p50 == pytest.approx(3.0)


def test_a_stall_is_in_an_open_loops_percentiles() -> None:
    """A server of 10 ms a request stands still once, for two seconds of forty: what would have come then has waited.

    A closed loop of one caller sees a single slow request, which its 99th percentile leaves out (coordinated omission).
    """

    def seconds(now: float) -> float:
        return 22.0 - now if 20 <= now < 22 else 0.01

    # Exact for the open loop: each waits for those before it.
    run, _ = measured(OpenLoop(20), Extent(seconds=40), seconds)
    free, expected = 0.0, []
    for arrival in (one.arrived for one in run.records):
        started = max(free, arrival)
        free = started + seconds(started)
        expected.append(free - arrival)
    told = figures_of(run).latency
    assert told is not None
    assert told.p99 == pytest.approx(np.quantile(expected, 0.99))
    assert told.p99 > 1.0

    closed = figures(ClosedLoop(1), Extent(seconds=40), seconds).latency
    assert closed is not None
    assert closed.max == pytest.approx(2.0, abs=0.02)
    assert closed.p99 == pytest.approx(0.01)


def test_a_load_generator_that_is_late_is_told_and_counts_from_the_arrival() -> None:
    """Its own thread is held up for a second: requests are sent late, and had arrived before."""

    async def work() -> Run:
        loop = asyncio.get_running_loop()
        server = Server(lambda _: 0.0, workers=1000)

        def hold_up() -> None:
            loop.passing.now += 1.0  # type: ignore[attr-defined]

        loop.call_at(5.0, hold_up)
        return await run_load(server, OpenLoop(10), Extent(seconds=10), repeat(REQUEST), seed=1, stop=asyncio.Event())

    told = figures_of(virtual_time.run(work()))
    assert told.lag is not None
    assert told.latency is not None
    assert 0.5 < told.lag.max <= 1.0
    assert told.latency.max == pytest.approx(told.lag.max)


def test_errors_are_counted_by_their_code_and_not_in_the_latencies() -> None:
    fates = iter([None, QueueFullError("full"), None, DeadlineError("late"), QueueFullError("full")])

    class Failing(Server):
        async def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            fate = next(fates)
            if fate is not None:
                raise fate
            async for event in super().stream(request):
                yield event

    async def work() -> Run:
        return await run_load(
            Failing(lambda _: 1.0),
            ClosedLoop(1),
            Extent(requests=5),
            repeat(REQUEST),
            seed=0,
            stop=asyncio.Event(),
        )

    run = virtual_time.run(work())
    told = figures_of(run, deadline_s=1.5)
    assert told.errors == {"deadline": 1, "queue_full": 2}
    assert (told.requests, told.done) == (5, 2)
    assert told.latency is not None
    assert (told.latency.count, told.latency.max) == (2, 1.0)
    assert told.deadline_met == pytest.approx(2 / 5)
    assert [one.message for one in run.records if one.error] == ["full", "late", "full"]


def test_a_deadline_is_met_by_those_that_are_done_in_time() -> None:
    run, _ = measured(ClosedLoop(3), Extent(requests=30), lambda _: 0.1)
    assert figures_of(run, deadline_s=0.25).deadline_met == pytest.approx(2 / 30)  # but for the first two, all take 0.3
    assert figures_of(run).deadline_met is None


@pytest.mark.parametrize("load", [ClosedLoop(3), OpenLoop(30)], ids=str)
def test_stopping_cancels_what_is_under_way_and_tells_the_rest(load: Load) -> None:
    run, server = measured(load, Extent(requests=1000), lambda _: 0.1, stop_at=5.04)
    told = figures_of(run)
    assert run.interrupted
    assert told.seconds == pytest.approx(5.04 - run.begin)
    assert told.interrupted == server.cancelled > 0
    assert told.done == 50 - int(5.04 - run.begin < 5.0)
    assert {one.error for one in run.records if one.done is None} == {INTERRUPTED}


def test_a_bug_is_raised_and_nothing_is_left_running() -> None:
    class Broken(Server):
        async def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            await asyncio.sleep(0.1)
            raise ZeroDivisionError
            yield

    for load in (ClosedLoop(2), OpenLoop(10)):

        async def work(load: Load = load) -> None:
            await run_load(
                Broken(lambda _: 1.0), load, Extent(requests=9), repeat(REQUEST), seed=0, stop=asyncio.Event()
            )

        with pytest.raises(ZeroDivisionError):
            virtual_time.run(work())


def test_records_hold_what_was_asked_and_when_what_was_heard() -> None:
    heard: list[Record] = []

    async def work() -> Run:
        server = Server(lambda _: 1.0)
        stop = asyncio.Event()
        return await run_load(
            server, ClosedLoop(2), Extent(requests=2), repeat(REQUEST), seed=0, stop=stop, on_record=heard.append
        )

    run = virtual_time.run(work())
    assert heard == list(run.records)
    first, second = run.as_json()["records"]
    assert first["asked"] == {"prompt": "a", "steps": 4, "num_images": 1, "seed": -1}
    assert [second[name] for name in ("arrived", "sent", "queued", "first_step", "first_preview", "done")] == [
        0, 0, 0, 1.5, 1.5, 2.0
    ]  # fmt: skip
    assert (second["queue_s"], second["served_s"], second["eta_s"], second["images"]) == (1.0, 2.0, 0.5, 1)
