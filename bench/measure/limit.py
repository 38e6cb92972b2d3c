"""Near the limit: how much of the wall time is the engines' own."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import Deployment
from measure.bare import BareEngines
from measure.load import closed_loop, mixed_requests
from measure.server import our_server
from measure.tables import NO_TARGET, at_least, table

__all__ = ["CONCURRENCY", "Limit", "limit_table", "run_limit"]

CONCURRENCY = 16
SHARE_TARGET = at_least(0.9)

_CORES = os.cpu_count() or 1
_THREADS = "intra_op_num_threads"
_BENCH = Path(__file__).resolve().parents[1]
_MODEL = f"import sys\nsys.path.append({str(_BENCH)!r})\nfrom measure.turns import TurnsModel as TritonPythonModel\n"


@dataclass(frozen=True)
class Limit:
    """One round: the server's wall seconds, and those of its very calls on bare engines."""

    wall: float
    bare: float
    calls: int
    steps: int

    @property
    def share(self) -> float:
        return self.bare / self.wall


def run_limit(deployment: Path, requests: int, rounds: int) -> dict[int, list[Limit]]:
    """The rounds by the engines' threads: one fewer than there are cores, and one for each core.

    With one fewer the service and the load generator have a core of their own, as they have beside a GPU.
    """
    return {threads: _run(deployment, requests, rounds, threads) for threads in (max(1, _CORES - 1), _CORES)}


def _run(deployment: Path, requests: int, rounds: int, threads: int) -> list[Limit]:
    """Rounds are short, and each one's calls are replayed at once: the machine's speed wanders within seconds."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        copy = _with_turns(deployment.absolute(), Path(folder) / "deployment", threads)
        engines = BareEngines(Deployment.load(copy), threads)
        with our_server(copy) as server:
            for number in range(rounds + 1):
                asked = mixed_requests(requests, seed=number)
                before = len(server.calls())
                wall = closed_loop(server, asked, CONCURRENCY).wall
                calls = server.calls(after=before)
                bare = engines.one_after_another(calls)
                if number:  # the first one warms both
                    measured.append(Limit(wall, bare, len(calls), sum(one.steps or 0 for one in asked)))
    print(f"near the limit, {threads} threads an engine: {statistics.median(one.share for one in measured):.3f}")
    return measured


def _with_turns(original: Path, copy: Path, threads: int) -> Path:
    """The same deployment by links, but for the models' code and their engines' threads."""
    shutil.copytree(original / "models", copy / "models", copy_function=lambda source, to: Path(to).symlink_to(source))
    shutil.copy(original / Deployment.FILE, copy)
    (copy / "checkpoints").symlink_to(original / "checkpoints")
    for code in (copy / "models").glob("*/1/model.py"):
        code.unlink()
        code.write_text(_MODEL, encoding="utf-8")
        file = code.parents[1] / "config.pbtxt"
        config = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        config.parameters[_THREADS].string_value = str(threads)
        file.unlink()
        file.write_text(text_format.MessageToString(config), encoding="utf-8")
    return copy


def limit_table(runs: dict[int, list[Limit]]) -> str:
    rows = []
    for threads, rounds in runs.items():

        def median(of: Callable[[Limit], float], rounds: Sequence[Limit] = rounds) -> float:
            return statistics.median(of(one) for one in rounds)

        low, share, high = (
            statistics.quantiles([one.share for one in rounds], n=4) if rounds[1:] else [rounds[0].share] * 3
        )
        goal = SHARE_TARGET.cells(share) if threads < _CORES else NO_TARGET
        rows.append(
            (
                f"{threads} of {_CORES}",
                f"{median(lambda one: one.wall):.2f}",
                f"{median(lambda one: one.bare):.2f}",
                f"{median(lambda one: one.calls):.0f}",
                f"{median(lambda one: one.steps):.0f}",
                f"{low:.2f}, {high:.2f}",
                f"{share:.3f}",
                *goal,
            )
        )
    head = ("cores of each engine", "wall s", "bare engines s", "calls", "steps", "quartiles", "engine share")
    return table((*head, "target", "met"), rows)
