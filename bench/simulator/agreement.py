"""The simulator beside the real server: the same requests at the same times, on a table fitted to its calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Final

import numpy as np
from PIL import Image

from diffuserve.images import encode_image
from diffuserve.manifest import Deployment, Manifest
from diffuserve.request import GenerateRequest
from diffuserve.spec import TEXT_ENCODER, UNET, VAE_DECODER
from measure.load import Run, closed_loop, mixed_requests, open_loop
from measure.poisson import arrivals, percentile
from measure.server import OurServer, our_server
from measure.tables import at_most
from measure.tables import table as markdown
from peers.common import Picture
from simulator.calibrate import LoggedCall, engine_costs, logged, loop_gaps
from simulator.clock import Clock
from simulator.costs import CostTable
from simulator.fleet import Result, run_open
from simulator.inflight import InFlightServer
from simulator.server import Texts
from simulator.workload import Mix, SimRequest

__all__ = ["LOADS", "Compared", "Measured", "RealRun", "agreement_table", "compare", "measure"]

LOADS: Final = (0.3, 0.6, 0.85)
TARGET: Final = at_most(15, " %")
#: An odd number of them: the median is a request of one kind, and not in the gap between two.
_MIX: Final = Mix((4, 8, 20, 30, 50), 0.5)
_CAPACITY_REQUESTS: Final = 64
_CAPACITY_AT_ONCE: Final = 16
_SEED: Final = 11


@dataclass(frozen=True)
class RealRun:
    """The server at one load for a while: what it was sent, what came back, the engine calls that it made."""

    load: float
    rate: float
    requests: tuple[SimRequest, ...]
    run: Run
    calls: tuple[LoggedCall, ...]


@dataclass(frozen=True)
class Measured:
    """The table of a server's calls in all runs, those of its calls at each load, and the runs."""

    table: CostTable
    at_load: dict[float, CostTable]
    runs: tuple[RealRun, ...]


def measure(deployment: Path, seconds: float, rounds: int, name: str) -> Measured:
    """Run the real server at each load in turn, `rounds` times, for about `seconds` each time.

    In turns, as a machine's speed wanders: every load has its share of fast and slow minutes.
    """
    loaded = Deployment.load(deployment)
    manifest = loaded.manifest(loaded.checkpoints[0])
    components = {manifest.components[one].model: one for one in (TEXT_ENCODER, UNET, VAE_DECODER)}
    with our_server(deployment) as server:
        trials = _settled(logged(server.calls(), components))
        before = len(server.calls())
        full = closed_loop(server, _capacity_requests(), _CAPACITY_AT_ONCE)
        trials += logged(server.calls(after=before), components)
        # Of the mix, and not of what happened to be asked for.
        asked = mean(one.rows * one.steps for one in map(_simulated, range(len(full.latencies)), _capacity_requests()))
        most = full.rate * asked / _MIX.row_steps
        print(f"capacity, {_CAPACITY_AT_ONCE} at once: {most:.2f} pictures/s", flush=True)
        runs = list[RealRun]()
        for turn in range(rounds):
            for load in LOADS:
                seed = _SEED + 1 + len(runs)
                runs.append(_real_run(server, components, load, load * most, seconds, seed))
                print(f"round {turn + 1}, {load:.0%}: p50 {percentile(runs[-1].run.latencies, 0.5):.3f} s", flush=True)
    return _fitted(name, manifest, trials, runs)


def _capacity_requests() -> list[GenerateRequest]:
    return mixed_requests(_CAPACITY_REQUESTS, _SEED, _MIX.steps)


def _settled(trials: Sequence[LoggedCall]) -> list[LoggedCall]:
    """The UNet calls by which a new server learns its costs, without the first of each row count."""
    seen, kept = set[int](), []
    for call in trials:
        if call.component == UNET:
            if call.rows in seen:
                kept.append(call)
            seen.add(call.rows)
    return kept


def _real_run(
    server: OurServer, components: dict[str, str], load: float, rate: float, seconds: float, seed: int
) -> RealRun:
    count = max(10, round(rate * seconds))
    asked, times = mixed_requests(count, seed, _MIX.steps), arrivals(count, rate, seed)
    before = len(server.calls())
    run = open_loop(server, asked, times)
    calls = logged(server.calls(after=before), components)
    return RealRun(load, rate, tuple(map(_simulated, range(count), asked, times)), run, tuple(calls))


def _simulated(key: int, request: GenerateRequest, arrives: float = 0.0) -> SimRequest:
    guided = (request.guidance_scale or 0.0) > 1
    texts = (request.prompt, request.negative_prompt) if guided else (request.prompt,)
    return SimRequest(key, request.steps or 0, guided, texts, arrives)


def _fitted(name: str, manifest: Manifest, trials: list[LoggedCall], runs: Sequence[RealRun]) -> Measured:
    in_runs = [call for run in runs for call in run.calls]
    engines = engine_costs(_in_order([*trials, *in_runs]))
    pictures = [(picture, latency) for run in runs for picture, latency in _pictures(run)]
    way = mean(latency - picture.info["queued_s"] - picture.info["run_s"] for picture, latency in pictures)
    # A request that finds the server idle and its texts known waits only for its rows to join.
    join = float(np.quantile([picture.info["queued_s"] for picture, _ in pictures], 0.05))
    size = manifest.size.opt
    table = CostTable(
        name=name,
        source=(
            f"measured by make bench-simulate on {date.today():%Y-%m-%d}, {os.cpu_count()} CPU cores, no GPU: "
            f"{len(trials) + len(in_runs)} engine calls of the real server for {len(pictures)} pictures",
        ),
        size=(size, size),
        max_rows=manifest.max_rows(UNET, size, size),
        between=loop_gaps(run.calls for run in runs).rounded(),
        before=round(way / 2, 6),
        join=round(join, 6),
        file=round(_file_seconds(pictures[0][0].image), 6),
        reply=round(way / 2, 6),
        **engines.fields(),
    )
    at_load = {
        load: engine_costs(_in_order(call for run in runs if run.load == load for call in run.calls), engines)
        for load in LOADS
    }
    return Measured(table, {load: replace(table, **one.fields()) for load, one in at_load.items()}, tuple(runs))


def _in_order(calls: Iterable[LoggedCall]) -> list[LoggedCall]:
    return sorted(calls, key=lambda call: call.started)


def _pictures(run: RealRun) -> list[tuple[Picture, float]]:
    return list(zip(run.run.pictures, run.run.latencies, strict=True))


def _file_seconds(image: Image.Image) -> float:
    def once() -> float:
        started = time.perf_counter()
        encode_image(image, "png")
        return time.perf_counter() - started

    return median(once() for _ in range(9))


@dataclass(frozen=True)
class Compared:
    """One load: the latencies of the real server and of the simulated one, of the same requests.

    `simulated` is on a table of the calls at that load, `common` on the one of all calls.
    """

    load: float
    rate: float
    real: tuple[float, ...]
    simulated: tuple[float, ...]
    common: tuple[float, ...]
    real_rows: float
    simulated_rows: float

    def off(self, q: float) -> float:
        """By how much the simulated quantile differs."""
        return percentile(self.simulated, q) / percentile(self.real, q) - 1


def compare(measured: Measured) -> list[Compared]:
    """Simulate what the real server was sent."""
    texts = Texts()
    texts.new(text for one in _capacity_requests() for text in _simulated(0, one).texts)
    outcomes: dict[float, list[tuple[RealRun, Result, Result]]] = {load: [] for load in LOADS}
    for run in measured.runs:
        own, common = (_simulate(one, run, texts) for one in (measured.at_load[run.load], measured.table))
        outcomes[run.load].append((run, own, common))
        texts.new(text for one in run.requests for text in one.texts)
    return [_compared(load, of_load) for load, of_load in outcomes.items()]


def _simulate(table: CostTable, run: RealRun, texts: Texts) -> Result:
    clock = Clock()
    return run_open(clock, [InFlightServer(clock, table, Texts(set(texts.known)))], run.requests)


def _compared(load: float, runs: Sequence[tuple[RealRun, Result, Result]]) -> Compared:
    steps = [call.rows for run, _, _ in runs for call in run.calls if call.component == UNET]
    return Compared(
        load=load,
        rate=mean(run.rate for run, _, _ in runs),
        real=tuple(latency for run, _, _ in runs for latency in run.run.latencies),
        simulated=tuple(one.latency for _, result, _ in runs for one in result.served),
        common=tuple(one.latency for _, _, result in runs for one in result.served),
        real_rows=mean(steps),
        simulated_rows=sum(one.calls.rows for _, one, _ in runs) / sum(one.calls.calls for _, one, _ in runs),
    )


def agreement_table(compared: Sequence[Compared]) -> str:
    """Two rows a load: the median and the 99th percentile of the latencies."""
    rows = [
        (
            f"{one.load:.0%}",
            f"{one.rate:.2f}",
            str(len(one.real)),
            name,
            f"{percentile(one.real, q):.3f}",
            f"{percentile(one.simulated, q):.3f}",
            f"{one.off(q):+.0%}",
            *TARGET.cells(100 * abs(one.off(q))),
            f"{percentile(one.common, q):.3f}",
            f"{one.real_rows:.1f}",
            f"{one.simulated_rows:.1f}",
        )
        for one in compared
        for name, q in (("p50", 0.5), ("p99", 0.99))
    ]
    heads = ("load", "requests/s", "pictures", "latency", "real s", "simulated", "difference", "target", "met")
    return markdown((*heads, "common table", "rows a call", "simulated"), rows)
