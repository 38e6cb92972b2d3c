"""The figures of docs/simulator.md, as SVG that is the same for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from simulator.experiments import FLEETS, SYSTEMS, Point

__all__ = ["draw_fleets", "draw_one_server"]

_SHARES = (0.5, 0.99)


def draw_one_server(figures: Mapping[str, Sequence[Point]], file: Path) -> None:
    """A row of two panels for each machine: p50 and p99 against arrivals, a line for each system."""
    figure, panels = _panels(len(figures))
    for row, (title, points) in zip(panels, figures.items(), strict=True):
        for share, panel in zip(_SHARES, row, strict=True):
            for system in SYSTEMS:
                kept = [one for one in points if one.system == system and one.keeps_up]
                _line(panel, system, [one.rate for one in kept], [one.result.latency(share) for one in kept])
            panel.set(title=f"{title}, p{share * 100:.0f}", xlabel="requests a second")
            panel.legend()
    _save(figure, file)


def draw_fleets(points: Sequence[Point], file: Path) -> None:
    """p50 and p99 against the load, a line for each fleet and router; in-flight only."""
    figure, panels = _panels(1)
    systems = [name for name in dict.fromkeys(one.system for one in points) if name.startswith(SYSTEMS[0])]
    for share, panel in zip(_SHARES, panels[0], strict=True):
        for servers in FLEETS:
            for system in systems:
                kept = [one for one in points if one.servers == servers and one.system == system and one.keeps_up]
                if kept:
                    name = f"{servers}, {system.removeprefix(SYSTEMS[0] + ', ')}" if servers > 1 else "1"
                    _line(panel, name, [one.load for one in kept], [one.result.latency(share) for one in kept])
        panel.set(title=f"servers and router, p{share * 100:.0f}", xlabel="load")
        panel.legend()
    _save(figure, file)


def _panels(rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, len(_SHARES), squeeze=False)
    for panel in panels.flat:
        panel.set(ylabel="seconds", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.grid(alpha=0.3)
    return figure, panels


def _line(panel: Any, name: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    panel.plot(xs, ys, marker="o", markersize=4, label=name)


def _save(figure: Figure, file: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": file.name, "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})
