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

    `first` are the seconds of the engines' first runs; `together` says how many calls began while another was under
    way.
    """

    wall: float
    bare: float
    first: float
    calls: int
    together: int
    steps: int


def run_limit(deployment: Path, requests: int, rounds: int) -> list[Limit]:
    """With engines that take turns, so that their calls one after another are the bound.

    Every call is made again at once inside the component, which is the bare engine's time for it and is taken off the
    wall time.
    """
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        copy = _with_twice_models(deployment.absolute(), Path(folder) / "deployment")
        with our_server(copy) as server:
            for number in range(rounds):
                asked = mixed_requests(requests, seed=number)
                before = len(_calls(copy))
                wall = closed_loop(server, asked, CONCURRENCY).wall
                calls = _calls(copy)[before:]
                bare = sum(again for _, _, again in calls)
                measured.append(
                    Limit(
                        wall=wall - bare,
                        bare=bare,
                        first=sum(first for _, first, _ in calls),
                        calls=len(calls),
                        together=sum(end > begin for (_, end), (begin, _) in pairwise(map(_interval, calls))),
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


def _calls(deployment: Path) -> list[tuple[float, float, float]]:
    """Each engine call so far: when it began, and the seconds of its two runs."""
    files = deployment.glob("models/*/twice.jsonl")
    return sorted(tuple(json.loads(line)) for file in files for line in file.read_text().splitlines())


def _interval(call: tuple[float, float, float]) -> tuple[float, float]:
    return call[0], sum(call)


def limit_table(rounds: Sequence[Limit]) -> str:
    def median(of: Callable[[Limit], float]) -> float:
        return statistics.median(of(one) for one in rounds)

    share, together = median(lambda one: one.bare / one.wall), max(one.together for one in rounds)
    shares = sorted(one.bare / one.wall for one in rounds)
    rows = [
        ("wall seconds", f"{median(lambda one: one.wall):.2f}", *NO_TARGET),
        ("its engine calls, seconds", f"{median(lambda one: one.first):.2f}", *NO_TARGET),
        ("the same calls on bare engines, seconds", f"{median(lambda one: one.bare):.2f}", *NO_TARGET),
        ("engine calls", f"{median(lambda one: one.calls):.0f}", *NO_TARGET),
        ("denoising steps", f"{median(lambda one: one.steps):.0f}", *NO_TARGET),
        ("calls beside another, which would make the share too large", str(together), *ALONE_TARGET.cells(together)),
        ("engine share of the wall time, lowest and highest", f"{shares[0]:.2f}, {shares[-1]:.2f}", *NO_TARGET),
        ("engine share of the wall time", f"{share:.2f}", *SHARE_TARGET.cells(share)),
    ]
    return table(("", "measured", "target", "met"), rows)
