"""Closed loop: many mixed requests at once, this service and every peer in alternating rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from measure.load import Run, closed_loop, mixed_requests
from measure.poisson import percentile
from measure.tables import NO_TARGET, at_least, table
from peers.common import Serve

__all__ = ["OURS", "TARGETS", "closed_table", "run_closed"]

OURS = "diffuserve"
#: How many times the peer's images/s this service must make, by the peer's letter.
TARGETS = {"a": at_least(2.5), "c1": at_least(1.05), "d": at_least(1.5)}


def run_closed(systems: Mapping[str, Serve], requests: int, rounds: int) -> dict[str, list[Run]]:
    """Each round sends the same requests to every system; the order turns by one each round."""
    runs: dict[str, list[Run]] = {key: [] for key in systems}
    order = list(systems)
    for number in range(rounds):
        asked = mixed_requests(requests, seed=number)
        for key in order:
            runs[key].append(closed_loop(systems[key], asked, requests))
            print(f"closed loop, round {number + 1}, {key}: {runs[key][-1].rate:.2f} images/s", flush=True)
        order = [*order[1:], order[0]]
    return runs


def closed_table(runs: Mapping[str, list[Run]], names: Mapping[str, str]) -> str:
    """Medians over the rounds; the ratio is the median of the rounds' own ratios."""
    rows = []
    for key, mine in runs.items():
        latencies = [latency for run in mine for latency in run.latencies]
        ratio = statistics.median(ours.rate / its.rate for ours, its in zip(runs[OURS], mine, strict=True))
        target = TARGETS.get(key)
        rows.append(
            (
                names[key],
                f"{statistics.median(run.rate for run in mine):.2f}",
                f"{percentile(latencies, 0.5):.2f}",
                f"{percentile(latencies, 0.99):.2f}",
                "" if key == OURS else f"{ratio:.2f}",
                *(target.cells(ratio) if target else NO_TARGET),
            )
        )
    return table(("system", "images/s", "p50 s", "p99 s", "diffuserve makes, times", "target", "met"), rows)
