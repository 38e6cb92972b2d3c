"""A bench's figures as JSON, and as tables in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diffuserve_client._bench.figures import PERCENTILES, Distribution, Figures, figures_of
from diffuserve_client._bench.record import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Bench"]

#: The version of what `as_json` makes.
_FORMAT: Final = 1
#: A figure's name, and its row's in the table.
_ROWS: Final = {
    "latency": "latency",
    "queued": "until the server has it",
    "queue": "in the server's queue",
    "first_step": "until the first step",
    "first_preview": "until the first preview",
    "lag": "sent late by",
}
_NOTICED_LAG: Final = 0.01  # seconds, of the 99th percentile


@dataclass(frozen=True)
class Bench:
    """The runs of a bench. `description` says what was measured, as JSON can hold it; nothing in it is of a machine."""

    description: Mapping[str, Any]
    deadline_s: float | None
    runs: Sequence[Run]

    def figures(self, run: Run) -> Figures:
        return figures_of(run, self.deadline_s)

    def as_json(self) -> str:
        runs = [{"figures": self.figures(one).as_json(), **one.as_json()} for one in self.runs]
        return json.dumps({"format": _FORMAT, **self.description, "runs": runs}, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """A table for each run, and one of all where there are several."""
        for run in self.runs:
            self._print_run(console, run, self.figures(run))
        if len(self.runs) > 1:
            console.print(self._all_runs())

    def _print_run(self, console: Console, run: Run, figures: Figures) -> None:
        title = f"{run.load}, {figures.seconds:.1f} s" + (", interrupted" if run.interrupted else "")
        rows = {name: getattr(figures, name) for name in _ROWS}
        if rows["lag"] is not None and rows["lag"].p99 < _NOTICED_LAG:
            rows["lag"] = None  # the load generator kept up
        console.print(_times({_ROWS[name]: row for name, row in rows.items() if row is not None}, title))
        for line in _lines(figures, self.deadline_s):
            console.print(line, highlight=False)
        console.print()

    def _all_runs(self) -> Table:
        table = _table(None, self.runs[0].load.of, "images/s", "steps/s", "errors", "p50 s", "p90", "p99", "max")
        for run in self.runs:
            one = self.figures(run)
            shown = ["-"] * 4
            if (latency := one.latency) is not None:
                shown = [_seconds(value) for value in (latency.p50, latency.p90, latency.p99, latency.max)]
            errors = str(sum(one.errors.values()))
            table.add_row(run.load.short, f"{one.images_per_s:.2f}", f"{one.image_steps_per_s:.1f}", errors, *shown)
        return table


def _times(rows: Mapping[str, Distribution], title: str) -> Table:
    table = _table(title, "seconds", "mean", *(f"p{share}" for share in PERCENTILES), "max")
    for name, one in rows.items():
        table.add_row(name, *map(_seconds, (one.mean, one.p50, one.p90, one.p95, one.p99, one.max)))
    return table


def _lines(figures: Figures, deadline_s: float | None) -> list[str]:
    errors = ", ".join(f"{count} {code}" for code, count in figures.errors.items()) or "no errors"
    cut = f"; {figures.interrupted} interrupted" if figures.interrupted else ""
    lines = [
        f"{figures.images_per_s:.2f} images/s, {figures.image_steps_per_s:.1f} steps/s",
        f"{figures.done} of {figures.requests} requests done; {errors}{cut}",
    ]
    if figures.deadline_met is not None and deadline_s is not None:
        lines.append(f"{figures.deadline_met:.1%} within the deadline of {deadline_s:g} s")
    if (eta := figures.eta_error) is not None:
        lines.append(f"the server's forecast was off by {eta.p50:.0%} (p50), {eta.p90:.0%} (p90); bias {eta.bias:+.0%}")
    return lines


def _table(title: str | None, first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
