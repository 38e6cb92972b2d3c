"""Servers on a virtual clock: latency against arrivals, in-flight batching beside whole batches, one server and fleets.

    tables    every table and figure of docs/simulator.md but the agreement; a few minutes on one core
    ask       one answer: a table of costs, a fleet, an arrival rate
    agree     the real embedded server at three loads beside the simulated one, on a table fitted to its own calls

What is decided in a simulated server is decided by the very StepPolicy that serves. Seeded: the same command makes
the same numbers, `agree` excepted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulator.clock import Clock
from simulator.costs import TABLES, CostTable
from simulator.experiments import (
    SYSTEMS,
    Point,
    capacity,
    fixed_part,
    fleet_points,
    make_server,
    one_server,
    published,
)
from simulator.fleet import least_work, run_open
from simulator.h100 import NAME as H100
from simulator.report import PAGE, fixed_table, fleet_table, one_server_table, published_table, write_section
from simulator.workload import MIXED, UNIFORM, Mix, poisson

CPU = "shapes-cpu"
SEED = 1
_SEEDS = (1, 2, 3, 4, 5)


@dataclass
class Parts:
    """The tables, each made when it is asked for; points are kept for the figures."""

    one_server: dict[str, list[Point]]
    fleets: list[Point]

    def published(self) -> str:
        return published_table(published(_SEEDS))

    def server(self, title: str, table: CostTable, mix: Mix) -> str:
        self.one_server[title] = one_server(table, mix, SEED)
        return one_server_table(self.one_server[title])

    def fleet(self) -> str:
        self.fleets = fleet_points(CostTable.load(H100), MIXED, SEED)
        return fleet_table(self.fleets)


def make_tables(write: bool) -> None:
    parts = Parts({}, [])
    cpu, h100 = CostTable.load(CPU), CostTable.load(H100)
    sections: dict[str, Callable[[], str]] = {
        "published": parts.published,
        "one server, this machine": lambda: parts.server("two CPU cores, mixed", cpu, MIXED),
        "one server, H100": lambda: parts.server("one H100, mixed", h100, MIXED),
        "one server, H100, uniform": lambda: parts.server("one H100, uniform", h100, UNIFORM),
        "fleets": parts.fleet,
        "fixed part": lambda: fixed_table(fixed_part(SEED)),
    }
    for name, make in sections.items():
        text = make()
        print(f"\n## {name}\n\n{text}", flush=True)
        if write:
            write_section(name, text)
    if write:
        from simulator.plots import draw_fleets, draw_one_server

        draw_one_server(parts.one_server, PAGE.with_name("simulator-one-server.svg"))
        draw_fleets(parts.fleets, PAGE.with_name("simulator-fleets.svg"))


def ask(table: CostTable, servers: int, rate: float, mix: Mix, count: int) -> str:
    """One line for each system: what a fleet behind a least-work router would do with `rate` requests a second."""
    requests, load = poisson(mix, count, rate, SEED), rate / servers / capacity(table, mix, SEED)
    points = []
    for system in SYSTEMS:
        clock = Clock()
        result = run_open(clock, [make_server(system, clock, table) for _ in range(servers)], requests, least_work)
        points.append(Point(system, load, rate / servers, servers, result))
    return fleet_table(points)


def agree(deployment: Path, seconds: float, rounds: int, write: bool) -> None:
    from simulator.agreement import agreement_table, compare, measure

    measured = measure(deployment, seconds, rounds, CPU)
    text = agreement_table(compare(measured))
    print(f"\n{text}")
    if write:
        measured.table.save()
        write_section("agreement", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser("tables", help="every table and figure of docs/simulator.md but the agreement")
    asking = commands.add_parser("ask", help="what a fleet would do")
    asking.add_argument("--table", default=H100, help=f"a name in {TABLES.name}/: {', '.join(_names())}")
    asking.add_argument("--servers", type=int, default=1)
    asking.add_argument("--rate", type=float, required=True, help="requests a second, all servers together")
    asking.add_argument("--steps", default=",".join(map(str, MIXED.steps)), help="drawn evenly, comma-separated")
    asking.add_argument("--guided", type=float, default=MIXED.guided, help="share of requests with guidance")
    asking.add_argument("--requests", type=int, default=1000)
    agreeing = commands.add_parser("agree", help="beside the real server")
    agreeing.add_argument("--deployment", type=Path, default=Path("build/deployments/shapes"))
    agreeing.add_argument("--seconds", type=float, default=20.0, help="of each load in each round")
    agreeing.add_argument("--rounds", type=int, default=3)
    for one in (tables, agreeing):
        one.add_argument("--write-docs", action="store_true", help="put them into docs/simulator.md")
    return parser


def _names() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.json"))


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command == "tables":
        make_tables(arguments.write_docs)
    elif arguments.command == "agree":
        agree(arguments.deployment, arguments.seconds, arguments.rounds, arguments.write_docs)
    else:
        if arguments.table not in _names():
            parser.error(f"no table {arguments.table!r}; there are {', '.join(_names())}")
        steps = tuple(int(one) for one in arguments.steps.split(","))
        mix = Mix(steps, arguments.guided)
        print(ask(CostTable.load(arguments.table), arguments.servers, arguments.rate, mix, arguments.requests))


if __name__ == "__main__":
    main()
