"""Open loop: requests that arrive on their own, at a share of what diffusers behind a lock can serve."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from measure.load import Run, closed_loop, mixed_requests, open_loop
from measure.poisson import arrivals, percentile
from measure.tables import NO_TARGET, at_most, table
from peers.common import Serve

__all__ = ["OpenPair", "eta_line", "open_table", "run_open"]

LOAD = 0.7
P99_TARGET = at_most(0.4)


@dataclass(frozen=True)
class OpenPair:
    """One seed's arrivals, served by both systems."""

    rate: float
    ours: Run
    peer: Run


def run_open(ours: Serve, peer: Serve, requests: int, seeds: Sequence[int], capacity_of: int) -> list[OpenPair]:
    """Measure the peer's capacity with `capacity_of` requests at once, then send both the same arrivals."""
    capacity = closed_loop(peer, mixed_requests(capacity_of, seed=1000), capacity_of).rate
    print(f"open loop: the peer's capacity is {capacity:.2f} images/s", flush=True)
    pairs = []
    for turn, seed in enumerate(seeds):
        asked, times = mixed_requests(requests, seed), arrivals(requests, LOAD * capacity, seed)
        runs: dict[bool, Run] = {}
        for is_ours in (turn % 2 == 0, turn % 2 == 1):
            runs[is_ours] = open_loop(ours if is_ours else peer, asked, times)
            who = "diffuserve" if is_ours else "peer"
            print(f"open loop, seed {seed}, {who}: p99 {percentile(runs[is_ours].latencies, 0.99):.2f} s", flush=True)
        pairs.append(OpenPair(LOAD * capacity, runs[True], runs[False]))
    return pairs


def open_table(pairs: Sequence[OpenPair], seeds: Sequence[int], names: tuple[str, str]) -> str:
    """Each seed's latencies, and those of all together, which alone are enough for a 99th percentile to mean much."""
    rates = [f"{pair.rate:.2f}" for pair in pairs]
    ours, peers = [pair.ours.latencies for pair in pairs], [pair.peer.latencies for pair in pairs]
    everything = "all", rates[0], list(chain(*ours)), list(chain(*peers))
    rows: list[tuple[str, ...]] = []
    for seed, rate, mine, theirs in (*zip(map(str, seeds), rates, ours, peers, strict=True), everything):
        ratio = percentile(mine, 0.99) / percentile(theirs, 0.99)
        cells = (f"{ratio:.2f}", *P99_TARGET.cells(ratio)), ("", *NO_TARGET)
        for name, latencies, last in zip(names, (mine, theirs), cells, strict=True):
            p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
            rows.append((seed, name, rate, f"{p50:.2f}", f"{p99:.2f}", *last))
    return table(("seed", "system", "arrivals/s", "p50 s", "p99 s", "p99, times the peer's", "target", "met"), rows)


def eta_line(pairs: Sequence[OpenPair]) -> str:
    """How far the times that admission predicted were from what came, and how far apart alike requests are anyway."""
    infos = [picture.info for pair in pairs for picture in pair.ours.pictures]
    errors = list[float]()
    alike: dict[tuple[int, bool], list[float]] = {}
    for info in infos:
        total = info["queued_s"] + info["run_s"]
        alike.setdefault((info["steps"], info["guidance_scale"] > 1.0), []).append(total)
        if (predicted := info.get("eta_s")) is not None:
            errors.append(abs(predicted - total) / total)
    if not errors:
        return "Error of the predicted time: not measured, the pictures' info holds no eta_s."
    spread = statistics.median(
        abs(total / statistics.median(totals) - 1.0) for totals in alike.values() for total in totals
    )
    return (
        f"Error of the predicted time: {statistics.median(errors):.0%} in the median of {len(errors)} requests. "
        f"Requests of the same steps, guided alike, were {spread:.0%} from their own median."
    )
