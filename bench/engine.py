"""The step engine's benches: this service beside every other design, on one machine, in one run.

    closed     64 mixed requests at once, all systems in alternating rounds
    open       Poisson arrivals at 70 % of what diffusers behind a lock can serve, the same ones for both
    overload   4-step requests among 50-step ones
    limit      the engines' own share of the wall time, 16 requests at once, one engine call at a time
    loop       the loop's own cost, over engines that compute nothing

Every system must make the same pictures first. `--quick` runs a little of everything: its figures prove that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from diffuserve.manifest import Deployment
from measure.closed import OURS, closed_table, run_closed
from measure.limit import CONCURRENCY, limit_table, run_limit
from measure.loop_cost import loop_cost_table, run_loop_cost
from measure.open import LOAD, eta_line, open_table, run_open
from measure.overload import LONG_REQUESTS, overload_table, run_overload
from measure.same_picture import check_same_pictures
from measure.server import our_server
from peers.common import Places, Serve
from peers.designs import PEERS


@dataclass(frozen=True)
class Size:
    """How much is run."""

    closed_requests: int = 64
    rounds: int = 3
    open_requests: int = 200  # of each seed
    open_seeds: tuple[int, ...] = (1, 2, 3)
    short_requests: int = 200
    limit_requests: int = 64
    limit_rounds: int = 15
    loop_steps: int = 150


QUICK = Size(
    closed_requests=12,
    rounds=1,
    open_requests=20,
    open_seeds=(1,),
    short_requests=15,
    limit_requests=16,
    limit_rounds=1,
    loop_steps=40,
)


def closed_part(places: Places, size: Size) -> str:
    names = {OURS: OURS} | {key: peer.name for key, peer in PEERS.items()}
    with ExitStack() as stack:
        systems: dict[str, Serve] = {OURS: stack.enter_context(our_server(places.deployment))}
        for key, peer in PEERS.items():
            systems[key] = stack.enter_context(peer.open(places))
        check_same_pictures(systems[OURS], {names[key]: serve for key, serve in systems.items() if key != OURS})
        runs = run_closed(systems, size.closed_requests, size.rounds)
    head = f"{size.closed_requests} requests at once, 4, 8, 20 or 50 steps, half unguided; {size.rounds} rounds:"
    return f"{head}\n\n{closed_table(runs, names)}"


def open_part(places: Places, size: Size) -> str:
    peer = PEERS["a"]
    with our_server(places.deployment) as ours, peer.open(places) as locked:
        check_same_pictures(ours, {peer.name: locked})
        pairs = run_open(ours, locked, size.open_requests, size.open_seeds, capacity_of=size.closed_requests)
    head = f"{size.open_requests} Poisson arrivals of each seed at {LOAD:.0%} of (a)'s measured capacity:"
    return f"{head}\n\n{open_table(pairs, size.open_seeds, (OURS, peer.name))}\n\n{eta_line(pairs)}"


def overload_part(places: Places, size: Size) -> str:
    deployment = Deployment.load(places.deployment)
    with our_server(places.deployment) as ours:
        result = run_overload(ours, deployment.manifest(deployment.checkpoints[0]), size.short_requests)
    head = f"{size.short_requests} requests of 4 steps, one after the other, among {LONG_REQUESTS} of 50 steps at once:"
    return f"{head}\n\n{overload_table(result)}"


def limit_part(places: Places, size: Size) -> str:
    rounds = run_limit(places.deployment, size.limit_requests, size.limit_rounds)
    head = (
        f"{size.limit_requests} mixed requests a round, {CONCURRENCY} at once; medians of {size.limit_rounds} rounds:"
    )
    return f"{head}\n\n{limit_table(rounds)}"


def loop_part(places: Places, size: Size) -> str:
    cost = run_loop_cost(places.deployment, size.loop_steps)
    return f"In process, medians:\n\n{loop_cost_table(cost)}\n\n```\n{cost.profile}\n```"


PARTS: dict[str, Callable[[Places, Size], str]] = {
    "closed": closed_part,
    "open": open_part,
    "overload": overload_part,
    "limit": limit_part,
    "loop": loop_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, default=Path("build/deployments/shapes"))
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shapes"))
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; all by default")
    parser.add_argument("--quick", action="store_true", help="a small run of everything")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")

    places = Places(arguments.checkpoint, arguments.deployment)
    size = QUICK if arguments.quick else Size()
    for part in parts:
        print(f"\n## {part}\n\n{PARTS[part](places, size)}\n", flush=True)


if __name__ == "__main__":
    main()
