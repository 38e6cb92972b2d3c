"""Requests, a router and servers, run to the end; and what came of it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from measure.poisson import percentile
from simulator.clock import Clock
from simulator.server import Calls, SimServer
from simulator.workload import SimRequest

__all__ = ["Result", "Router", "Served", "least_work", "random_server", "run_at_once", "run_open"]

_WARM_UP = 0.1  # of the requests: until the servers are as full as they will be

Router = Callable[[Sequence[SimServer], SimRequest], SimServer]


def least_work(servers: Sequence[SimServer], request: SimRequest) -> SimServer:  # noqa: ARG001
    """The server that will be idle first: join the shortest queue, by the seconds of work in it."""
    return min(servers, key=lambda server: server.work)


def random_server(seed: int) -> Router:
    """A router that knows nothing of its servers."""
    rng = random.Random(seed)
    return lambda servers, _: rng.choice(servers)


@dataclass(frozen=True, slots=True)
class Served:
    """A request and when its client had the picture, or the refusal."""

    request: SimRequest
    sent: float
    ended: float
    refused: bool

    @property
    def latency(self) -> float:
        return self.ended - self.sent


@dataclass(frozen=True)
class Result:
    """One run. `served` is in the order of the requests' ends."""

    served: tuple[Served, ...]
    calls: Calls

    @property
    def latencies(self) -> list[float]:
        """Of the pictures, without those of the first requests, which found the servers empty."""
        first = len(self.served) * _WARM_UP
        return [one.latency for one in self.served if not one.refused and one.request.key >= first]

    def latency(self, share: float) -> float:
        return percentile(self.latencies, share)

    @property
    def refused(self) -> int:
        return sum(one.refused for one in self.served)

    @property
    def rate(self) -> float:
        """Pictures a second, from the first request to the last picture."""
        seconds = max(one.ended for one in self.served) - min(one.sent for one in self.served)
        return (len(self.served) - self.refused) / seconds

    @property
    def mean_rows(self) -> float:
        """Rows of a UNet call."""
        return self.calls.rows / self.calls.calls

    @property
    def useful(self) -> float:
        """The share of rows that were of images that needed the step."""
        return self.calls.useful / self.calls.rows


class _Run:
    def __init__(self, clock: Clock, servers: Sequence[SimServer], router: Router) -> None:
        self._clock, self._servers, self._router = clock, servers, router
        self._sent: dict[int, float] = {}
        self._served: list[Served] = []
        self.on_end: Callable[[], None] = lambda: None
        for server in servers:
            server.on_end = self._ended

    def send(self, request: SimRequest) -> None:
        self._sent[request.key] = self._clock.now
        self._router(self._servers, request).submit(request)

    def _ended(self, request: SimRequest, served: bool) -> None:
        self._served.append(Served(request, self._sent.pop(request.key), self._clock.now, not served))
        self.on_end()

    def result(self) -> Result:
        """Let everything happen. Raises RuntimeError where a request got no end."""
        self._clock.run()
        if self._sent:
            raise RuntimeError(f"{len(self._sent)} requests never ended, the first of them {min(self._sent)}")
        calls = Calls()
        for server in self._servers:
            calls += server.counted
        return Result(tuple(self._served), calls)


def run_open(
    clock: Clock, servers: Sequence[SimServer], requests: Sequence[SimRequest], router: Router = least_work
) -> Result:
    """Send each request when it arrives."""
    run = _Run(clock, servers, router)
    for request in requests:
        clock.at(request.arrives, lambda request=request: run.send(request))  # type: ignore[misc]
    return run.result()


def run_at_once(
    clock: Clock,
    servers: Sequence[SimServer],
    requests: Sequence[SimRequest],
    at_once: int,
    router: Router = least_work,
) -> Result:
    """Keep so many requests in the servers until all are done."""
    run = _Run(clock, servers, router)
    left = deque(requests)

    def send_next() -> None:
        if left:
            run.send(left.popleft())

    run.on_end = send_next
    for _ in range(at_once):
        clock.at(0.0, send_next)
    return run.result()
