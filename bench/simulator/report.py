"""The tables of docs/simulator.md in Markdown, and the page with them in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from measure.tables import NO_TARGET, at_most, table
from simulator.experiments import FIXED_LOAD, SYSTEMS, FixedPart, Point, Published

__all__ = ["PAGE", "fixed_table", "fleet_table", "one_server_table", "published_table", "write_section"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "simulator.md"

_THROUGHPUT_TARGET: Final = at_most(10, " %")
_GROWS: Final = "grows"


def _latencies(point: Point) -> tuple[str, str, str]:
    if not point.keeps_up:
        return _GROWS, _GROWS, _GROWS
    p50, p95, p99 = (f"{point.result.latency(share):.2f}" for share in (0.5, 0.95, 0.99))
    return p50, p95, p99


def one_server_table(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        result = point.result
        first = point.system == SYSTEMS[0]
        rows.append(
            (
                f"{point.load:.0%}" if first else "",
                f"{point.rate:.2f}" if first else "",
                point.system,
                *_latencies(point),
                f"{result.rate:.2f}",
                f"{result.mean_rows:.1f}",
                f"{result.useful:.0%}",
            )
        )
    heads = ("load", "requests/s", "system", "p50 s", "p95 s", "p99 s", "pictures/s", "rows a call", "useful rows")
    return table(heads, rows)


def fleet_table(points: Sequence[Point]) -> str:
    rows = [
        (
            str(point.servers),
            f"{point.load:.0%}",
            f"{point.rate * point.servers:.1f}",
            point.system,
            *_latencies(point),
            f"{point.result.mean_rows:.1f}",
        )
        for point in points
    ]
    return table(("servers", "load", "requests/s", "system", "p50 s", "p95 s", "p99 s", "rows a call"), rows)


def fixed_table(parts: Sequence[FixedPart]) -> str:
    rows = []
    for part in parts:
        in_flight, _, alike = part.points
        rows.append(
            (
                f"{part.factor:g}",
                f"{1000 * part.call:.1f}",
                f"{1000 * part.row:.1f}",
                f"{in_flight.rate / FIXED_LOAD:.2f}",
                f"{in_flight.result.mean_rows:.1f}",
                _latencies(in_flight)[0],
                _latencies(in_flight)[2],
                _latencies(alike)[0],
                _latencies(alike)[2],
            )
        )
    heads = ("times", "fixed ms", "row ms", "pictures/s", "rows a call", "p50 s", "p99 s", "lockstep p50 s", "p99 s")
    return table(heads, rows)


def published_table(figures: Sequence[Published]) -> str:
    rows = []
    for one in figures:
        cells = _THROUGHPUT_TARGET.cells(100 * abs(one.off)) if one.unit == "pictures/s" else NO_TARGET
        rows.append((one.what, f"{one.published:.2f} {one.unit}", f"{one.simulated:.2f}", f"{one.off:+.1%}", *cells))
    return table(("8 H100, 20 guided steps", "published", "simulated", "difference", "target", "met"), rows)


def write_section(name: str, text: str, page: Path = PAGE, by: str = "bench/simulate.py") -> None:
    """Put `text` between the marks of that name. Raises ValueError where the page has no such marks."""
    begin, end = f"<!-- {name}: written by {by} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page.name} lacks the line {begin.strip()!r} or {end.strip()!r}; put them back")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")
