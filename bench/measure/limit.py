"""Near the limit: how much of the wall time is the engines' own."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from diffuserve.manifest import Deployment
from measure.load import closed_loop, mixed_requests
from measure.server import our_server
from measure.tables import NO_TARGET, at_least, at_most, table

__all__ = ["Limit", "limit_table", "run_limit"]

CONCURRENCY = 16
SHARE_TARGET = at_least(0.9)
ALONE_TARGET = at_most(0)

_BENCH = Path(__file__).resolve().parents[1]
_MODEL = f"import sys\nsys.path.append({str(_BENCH)!r})\nfrom measure.twice import TwiceModel as TritonPythonModel\n"


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
    """With overlap off, so that the server makes one engine call at a time and those calls are the bound.

    Every call is made again at once inside the component, which is the bare engine's time for it and is taken off the
    wall time.
    """
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        copy = _with_twice_models(deployment.absolute(), Path(folder) / "deployment")
        with our_server(copy, {"DIFFUSERVE_OVERLAP": "0"}) as server:
            for number in range(rounds):
                asked = mixed_requests(requests, seed=number)
                calls_before, replays_before = len(server.calls()), len(_replays(copy))
                wall = closed_loop(server, asked, CONCURRENCY).wall
                calls, replays = server.calls(after=calls_before), _replays(copy)[replays_before:]
                bare = sum(replays)
                measured.append(
                    Limit(
                        wall=wall - bare,
                        bare=bare,
                        called=sum(call["seconds"] for call in calls) - bare,
                        calls=len(calls),
                        together=_together(calls),
                        steps=sum(one.steps or 0 for one in asked),
                    )
                )
                print(f"near the limit, round {number + 1}: {bare:.2f} s of {wall - bare:.2f} s", flush=True)
    return measured


def _with_twice_models(original: Path, copy: Path) -> Path:
    """The same deployment by links, but for the models' code."""
    shutil.copytree(original / "models", copy / "models", copy_function=lambda source, to: Path(to).symlink_to(source))
    shutil.copy(original / Deployment.FILE, copy)
    (copy / "checkpoints").symlink_to(original / "checkpoints")
    for model in (copy / "models").glob("*/1/model.py"):
        model.unlink()
        model.write_text(_MODEL, encoding="utf-8")
    return copy


def _replays(deployment: Path) -> list[float]:
    """Seconds of each call's second run so far, in their order."""
    lines = [
        json.loads(line) for file in deployment.glob("models/*/twice.jsonl") for line in file.read_text().splitlines()
    ]
    return [seconds for _, seconds in sorted(lines)]


def _together(calls: Sequence[dict[str, float]]) -> int:
    ordered = sorted((call["started"], call["started"] + call["seconds"]) for call in calls)
    return sum(begin < end for (_, end), (begin, _) in pairwise(ordered))


def limit_table(rounds: Sequence[Limit]) -> str:
    def median(of: Callable[[Limit], float]) -> float:
        return statistics.median(of(one) for one in rounds)

    share, together = median(lambda one: one.bare / one.wall), max(one.together for one in rounds)
    shares = sorted(one.bare / one.wall for one in rounds)
    rows = [
        ("wall seconds", f"{median(lambda one: one.wall):.2f}", *NO_TARGET),
        ("its engine calls as the server saw them, seconds", f"{median(lambda one: one.called):.2f}", *NO_TARGET),
        ("the same calls on bare engines, seconds", f"{median(lambda one: one.bare):.2f}", *NO_TARGET),
        ("engine calls", f"{median(lambda one: one.calls):.0f}", *NO_TARGET),
        ("denoising steps", f"{median(lambda one: one.steps):.0f}", *NO_TARGET),
        ("calls beside another, which would make the share too large", str(together), *ALONE_TARGET.cells(together)),
        ("engine share of the wall time, lowest and highest", f"{shares[0]:.2f}, {shares[-1]:.2f}", *NO_TARGET),
        ("engine share of the wall time", f"{share:.2f}", *SHARE_TARGET.cells(share)),
    ]
    return table(("", "measured", "target", "met"), rows)
