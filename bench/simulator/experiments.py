"""The tables of docs/simulator.md: one server and fleets, against whole batches; and what was published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from simulator.clock import Clock
from simulator.costs import CostTable, Line
from simulator.fleet import Result, Router, least_work, random_server, run_at_once, run_open
from simulator.h100 import MLPERF, h100_table
from simulator.inflight import InFlightServer
from simulator.lockstep import LockstepServer
from simulator.server import SimServer
from simulator.workload import MIXED, UNIFORM, Mix, poisson

__all__ = [
    "BATCH",
    "FIXED_LOAD",
    "FLEETS",
    "LOADS",
    "SYSTEMS",
    "FixedPart",
    "Point",
    "Published",
    "capacity",
    "fixed_part",
    "fleet_points",
    "one_server",
    "published",
    "window",
]

BATCH: Final = 8
LOADS: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
FLEETS: Final = (1, 8, 64)
FLEET_LOADS: Final = (0.5, 0.8, 0.9)
FIXED_FACTORS: Final = (0.0, 1.0, 3.0)
FIXED_LOAD: Final = 0.8

_REQUESTS: Final = 1000
_REQUESTS_A_SERVER: Final = 200
_CAPACITY_REQUESTS: Final = 400
_CAPACITY_AT_ONCE: Final = 64
_SLOWER: Final = 1.02
_LEFT: Final = 0.1

#: A server by its name: in-flight, whole batches of anything, whole batches of requests that agree.
SYSTEMS: Final = ("in-flight", "lockstep, mixed", "lockstep, alike")


@dataclass(frozen=True)
class Point:
    """One system at one load. `rate` is arrivals a second at each server."""

    system: str
    load: float
    rate: float
    servers: int
    result: Result

    @property
    def keeps_up(self) -> bool:
        """Whether the queue is as long as it will be: few requests are without an answer when the last one comes."""
        served = self.result.served
        last = max(one.request.arrives for one in served)
        return sum(one.ended > last for one in served) <= _LEFT * len(served)


def window(table: CostTable) -> float:
    """How long the first of a batch waits for others: two calls of a full batch, guided."""
    return 2 * table.unet_call(2 * BATCH)


def make_server(system: str, clock: Clock, table: CostTable) -> SimServer:
    if system == SYSTEMS[0]:
        return InFlightServer(clock, table)
    return LockstepServer(clock, table, size=BATCH, window=window(table), alike=system == SYSTEMS[2])


def capacity(table: CostTable, mix: Mix, seed: int) -> float:
    """Pictures a second of one in-flight server that always has work."""
    clock = Clock()
    requests = mix.requests([0.0] * _CAPACITY_REQUESTS, seed)
    return run_at_once(clock, [InFlightServer(clock, table)], requests, _CAPACITY_AT_ONCE).rate


def one_server(table: CostTable, mix: Mix, seed: int, loads: Sequence[float] = LOADS) -> list[Point]:
    """Every system at each load; loads are shares of what the in-flight server can do."""
    most = capacity(table, mix, seed)
    return [
        _point(system, load, load * most, 1, table, mix, seed, least_work, _REQUESTS)
        for load in loads
        for system in SYSTEMS
    ]


def fleet_points(table: CostTable, mix: Mix, seed: int) -> list[Point]:
    """Fleets at the same load a server: in-flight behind each router, and batches of what agrees behind the better."""
    most = capacity(table, mix, seed)
    routed: list[tuple[str, str, Callable[[], Router]]] = [
        (f"{SYSTEMS[0]}, least work", SYSTEMS[0], lambda: least_work),
        (f"{SYSTEMS[0]}, random", SYSTEMS[0], lambda: random_server(seed)),
        (f"{SYSTEMS[2]}, least work", SYSTEMS[2], lambda: least_work),
    ]
    points = []
    for servers in FLEETS:
        count = max(_REQUESTS, _REQUESTS_A_SERVER * servers)
        for load in FLEET_LOADS:
            for name, system, router in routed:
                if servers > 1 or name != routed[1][0]:
                    point = _point(system, load, load * most, servers, table, mix, seed, router(), count)
                    points.append(replace(point, system=name))
    return points


@dataclass(frozen=True)
class FixedPart:
    """What follows if the fixed part of a UNet call were `factor` times as large: the points at one load."""

    factor: float
    call: float
    row: float
    points: tuple[Point, ...]


def fixed_part(seed: int) -> list[FixedPart]:
    """How much hangs on the part of the H100's table that is known least."""
    measured = []
    for factor in FIXED_FACTORS:
        table = h100_table(factor)
        row = table.unet_call(2) - table.unet_call(1)
        points = one_server(table, MIXED, seed, (FIXED_LOAD,))
        measured.append(FixedPart(factor, max(0.0, table.unet_call(1) - row), row, tuple(points)))
    return measured


def _point(
    system: str,
    load: float,
    rate: float,
    servers: int,
    table: CostTable,
    mix: Mix,
    seed: int,
    router: Router,
    count: int,
) -> Point:
    clock = Clock()
    requests = poisson(mix, count, rate * servers, seed)
    result = run_open(clock, [make_server(system, clock, table) for _ in range(servers)], requests, router)
    return Point(system, load, rate, servers, result)


@dataclass(frozen=True)
class Published:
    """A figure that MLPerf published, beside the simulator's."""

    what: str
    published: float
    simulated: float
    unit: str

    @property
    def off(self) -> float:
        return self.simulated / self.published - 1


def published(seeds: Sequence[int]) -> list[Published]:
    """MLPerf's two scenarios on 8 GPUs, batched as in that submission; and the first one with in-flight batching.

    The submission has no service around its engines, so its batches have none here. Latencies are medians over `seeds`:
    at 99 % of the capacity they depend on who comes when.
    """
    table = h100_table()
    bare = replace(table, between=Line(0.0, 0.0), before=0.0, join=0.0, file=0.0, reply=0.0)
    offline = UNIFORM.requests([0.0] * MLPERF.offline_requests, seeds[0])

    clock = Clock()
    batches = LockstepServer(clock, bare, size=MLPERF.offline_batch, window=0.0, alike=False, devices=MLPERF.gpus)
    as_submitted = run_at_once(clock, [batches], offline, len(offline))

    clock = Clock()
    fleet = [InFlightServer(clock, table) for _ in range(MLPERF.gpus)]
    in_flight = run_at_once(clock, fleet, offline[: len(offline) // 4], MLPERF.gpus * MLPERF.offline_batch)

    as_told, slower = (_mlperf_server(bare, factor, seeds) for factor in (1.0, _SLOWER))
    return [
        Published("offline, batches of 32", MLPERF.offline_rate, as_submitted.rate, "pictures/s"),
        Published("offline, in-flight", MLPERF.offline_rate, in_flight.rate, "pictures/s"),
        Published("server, batches of 8", MLPERF.server_completed, as_told.rate, "pictures/s"),
        Published("server, batches of 8: p50", MLPERF.server_p50, as_told.p50, "s"),
        Published("server, batches of 8: p99", MLPERF.server_p99, as_told.p99, "s"),
        Published(f"the same, {_SLOWER - 1:.0%} slower: p50", MLPERF.server_p50, slower.p50, "s"),
        Published(f"the same, {_SLOWER - 1:.0%} slower: p99", MLPERF.server_p99, slower.p99, "s"),
    ]


@dataclass(frozen=True)
class _Medians:
    rate: float
    p50: float
    p99: float


def _mlperf_server(table: CostTable, factor: float, seeds: Sequence[int]) -> _Medians:
    """The server scenario with engines that take `factor` times as long; medians over the seeds."""
    count = round(MLPERF.server_rate * MLPERF.server_seconds)
    results = []
    for seed in seeds:
        clock = Clock()
        batches = LockstepServer(
            clock,
            table.slower(factor),
            size=MLPERF.server_batch,
            window=MLPERF.server_window,
            alike=False,
            devices=MLPERF.gpus,
        )
        results.append(run_open(clock, [batches], poisson(UNIFORM, count, MLPERF.server_rate, seed)))
    return _Medians(
        median(one.rate for one in results),
        median(one.latency(0.5) for one in results),
        median(one.latency(0.99) for one in results),
    )
