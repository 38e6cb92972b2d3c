"""Near the limit: how much of the wall time is the engines' own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from diffuserve.manifest import Deployment
from measure.bare import BareEngines, Call
from measure.load import closed_loop, mixed_requests
from measure.server import our_server
from measure.tables import NO_TARGET, at_least, at_most, table

__all__ = ["Limit", "limit_table", "run_limit"]

CONCURRENCY = 16
SHARE_TARGET = at_least(0.9)
ALONE_TARGET = at_most(0)


@dataclass(frozen=True)
class Limit:
    """One round: the server's wall seconds, and those of its very calls on bare engines.

    `called` are the seconds that the calls took as the server saw them, on their way to the component and back
    included; `together` says how many began while another was under way.
    """

    wall: float
    bare: float
    called: float
    calls: int
    together: int
    steps: int


def run_limit(deployment: Path, requests: int, rounds: int) -> list[Limit]:
    """With overlap off, so that the server makes one engine call at a time and serial replay is the bound."""
    engines = BareEngines(Deployment.load(deployment))
    measured = []
    with our_server(deployment, {"DIFFUSERVE_OVERLAP": "0"}) as server:
        for number in range(rounds):
            asked = mixed_requests(requests, seed=number)
            before = len(server.calls())
            wall = closed_loop(server, asked, CONCURRENCY).wall
            calls = server.calls(after=before)
            bare = engines.one_by_one(calls)
            measured.append(
                Limit(
                    wall=wall,
                    bare=bare,
                    called=sum(call["seconds"] for call in calls),
                    calls=len(calls),
                    together=_together(calls),
                    steps=sum(one.steps for one in asked),
                )
            )
            print(f"near the limit, round {number + 1}: {bare:.2f} s of {wall:.2f} s", flush=True)
    return measured


def _together(calls: Sequence[Call]) -> int:
    ordered = sorted((call["started"], call["started"] + call["seconds"]) for call in calls)
    return sum(begin < end for (_, end), (begin, _) in pairwise(ordered))


def limit_table(rounds: Sequence[Limit]) -> str:
    def median(of: Callable[[Limit], float]) -> float:
        return statistics.median(of(one) for one in rounds)

    share, together = median(lambda one: one.bare / one.wall), max(one.together for one in rounds)
    rows = [
        ("wall seconds", f"{median(lambda one: one.wall):.2f}", *NO_TARGET),
        ("its engine calls as the server saw them, seconds", f"{median(lambda one: one.called):.2f}", *NO_TARGET),
        ("the same calls on bare engines, seconds", f"{median(lambda one: one.bare):.2f}", *NO_TARGET),
        ("engine calls", f"{median(lambda one: one.calls):.0f}", *NO_TARGET),
        ("denoising steps", f"{median(lambda one: one.steps):.0f}", *NO_TARGET),
        ("calls beside another, which would make the share too large", str(together), *ALONE_TARGET.cells(together)),
        ("engine share of the wall time", f"{share:.2f}", *SHARE_TARGET.cells(share)),
    ]
    return table(("", "measured", "target", "met"), rows)
