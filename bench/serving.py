"""This service beside diffusers' pipeline behind a lock and the bare engines, in one run on one machine.

The same requests go, all at once, (a) to a real Triton with diffuserve, (b) to diffusers' pipeline behind a lock,
as web servers around it do, and (c) the calls that (a) made of its engines are replayed on bare ONNX Runtime
sessions in this process, each model's calls one after another and the models side by side, with nothing in between:
the time that no server can go below with these engines and batches. Runs alternate, and medians over the rounds are
reported. `bench/engine.py` is the long bench, with more designs and loads.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from diffuserve.manifest import Deployment
from measure.bare import BareEngines
from measure.load import Run, closed_loop, mixed_requests
from measure.poisson import percentile
from measure.same_picture import check_same_pictures
from measure.server import our_server
from measure.tables import table
from peers.common import Places
from peers.locked import locked


def report(ours: list[Run], peer: list[Run], bare: list[float], count: int) -> str:
    rows = []
    for name, runs in (("diffuserve", ours), ("diffusers behind a lock", peer)):
        latencies = [latency for run in runs for latency in run.latencies]
        rate = statistics.median(run.rate for run in runs)
        rows.append((name, f"{rate:.2f}", f"{percentile(latencies, 0.5):.2f}", f"{percentile(latencies, 0.99):.2f}"))
    rows.append(("bare engines, diffuserve's calls", f"{count / statistics.median(bare):.2f}", "", ""))
    faster = statistics.median(b.wall / a.wall for a, b in zip(ours, peer, strict=True))
    share = statistics.median(1 - engine / run.wall for engine, run in zip(bare, ours, strict=True))
    return "\n".join(
        (
            table(("system", "images/s", "p50 s", "p99 s"), rows),
            "",
            f"diffuserve makes {faster:.2f} times the images/s of diffusers behind a lock (median of rounds).",
            f"Share of diffuserve's wall time that is not engine: {share:.0%} (median of rounds).",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, default=Path("build/deployments/shapes"))
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shapes"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    engines = BareEngines(Deployment.load(arguments.deployment))
    ours, peer, bare = [], [], []
    with our_server(arguments.deployment) as server, locked(Places(arguments.checkpoint, arguments.deployment)) as lock:
        check_same_pictures(server, {"diffusers behind a lock": lock})
        for number in range(arguments.rounds):
            requests = mixed_requests(arguments.requests, seed=1)
            before = len(server.calls())
            ours.append(closed_loop(server, requests, arguments.concurrency))
            calls = server.calls(after=before)
            peer.append(closed_loop(lock, requests, arguments.concurrency))
            bare.append(engines.side_by_side(calls))
            print(f"round {number + 1}: {len(calls)} engine calls for {sum(one.steps or 0 for one in requests)} steps")
    print(f"\n{arguments.requests} requests, {arguments.concurrency} at once, steps 4, 8, 20 or 50, half unguided:\n")
    print(report(ours, peer, bare, arguments.requests))


if __name__ == "__main__":
    main()
