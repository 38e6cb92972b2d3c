"""A table of costs from the calls that a real server made while it served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from diffuserve.engine import CALIBRATION_ROWS
from simulator.costs import Line

__all__ = ["EngineCosts", "LoggedCall", "engine_costs", "logged", "loop_gaps"]

_LONGEST_GAP: Final = 0.02  # seconds between two UNet calls; the loop had nothing to do in longer ones
_SHARINGS: Final = np.arange(0.8, 2.01, 0.05)

_ROUNDS: Final = 5
_USUAL_CALLS: Final = 5.0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One engine call: what it ran, how many were in it, when it began (monotonic clock) and ended."""

    component: str
    rows: int
    started: float
    ended: float


def logged(calls: Iterable[dict[str, Any]], components: dict[str, str]) -> list[LoggedCall]:
    """The lines of a call log, in the order of their starts; `components` maps Triton's model names to ours."""
    read = [
        LoggedCall(
            components[call["model"]],
            int(next(iter(call["shapes"].values()))[0]),
            call["started"],
            call["started"] + call["seconds"],
        )
        for call in calls
    ]
    return sorted(read, key=lambda call: call.started)


@dataclass(frozen=True)
class EngineCosts:
    """Seconds of calls alone, and how much calls side by side get done together (see Device)."""

    unet: dict[int, float]
    text_encoder: Line
    vae_decoder: float
    sharing: float

    def fields(self) -> dict[str, Any]:
        """What a CostTable holds of them, to microseconds."""
        return {
            "unet": {rows: round(seconds, 6) for rows, seconds in self.unet.items()},
            "text_encoder": self.text_encoder.rounded(),
            "vae_decoder": round(self.vae_decoder, 6),
            "sharing": round(self.sharing, 2),
        }


def engine_costs(calls: Sequence[LoggedCall], usual: EngineCosts | None = None) -> EngineCosts:
    """What calls take alone, and what they get done side by side: the sharing under which calls of the same rows agree
    best, however much company they had.

    Row counts that were rarely called are as in `usual`, where it is given.
    """
    alone, shared = _company(calls)
    component = np.array([call.component for call in calls])
    rows = np.array([call.rows for call in calls], dtype=np.float64)
    unet, texts, vae = (component == name for name in ("unet", "text_encoder", "vae_decoder"))
    fits = []
    for sharing in _SHARINGS:
        seconds = (alone + sharing * shared)[unet]
        points = _on_lines(rows[unet], seconds, usual.unet if usual else {})
        spread = np.std(np.log(seconds / np.interp(rows[unet], list(points), list(points.values()))))
        fits.append((float(spread), float(sharing), points))
    _, sharing, points = min(fits, key=lambda fit: fit[0])
    seconds = alone + sharing * shared
    text_line = _line(rows[texts], seconds[texts]) if texts.any() or usual is None else usual.text_encoder
    return EngineCosts(points, text_line, float(seconds[vae].mean()), sharing)


def _company(calls: Sequence[LoggedCall]) -> tuple[Array, Array]:
    """Of each call, the seconds in which it ran alone, and those in which others ran, divided by how many ran."""
    started, ended = (np.array([getattr(call, name) for call in calls]) for name in ("started", "ended"))
    times = np.unique(np.concatenate([started, ended]))
    middles, lengths = (times[1:] + times[:-1]) / 2, np.diff(times)
    running = np.searchsorted(np.sort(started), middles) - np.searchsorted(np.sort(ended), middles)
    first, last = np.searchsorted(times, started), np.searchsorted(times, ended)
    alone = np.where(running == 1, lengths, 0.0)
    shared = np.where(running > 1, lengths / np.maximum(running, 1), 0.0)
    sums = [np.concatenate([[0.0], np.cumsum(one)]) for one in (alone, shared)]
    return sums[0][last] - sums[0][first], sums[1][last] - sums[1][first]


def _on_lines(rows: Array, seconds: Array, usual: Mapping[int, float]) -> dict[int, float]:
    """Straight lines between row counts through the calls' means: least squares of the errors relative to the line.

    What is usual counts as a few calls more of each count.
    """
    counts = np.array(list(usual) or [count for count in CALIBRATION_ROWS if count <= rows.max()])
    hats = np.stack([np.interp(rows, counts, one) for one in np.eye(len(counts))], axis=1)
    known = (hats.sum(axis=0) > 0) | bool(usual)
    weights = np.ones(len(rows))
    if usual:
        hats = np.concatenate([hats, np.eye(len(counts))])
        seconds = np.concatenate([seconds, list(usual.values())])
        weights = np.concatenate([weights, np.full(len(counts), _USUAL_CALLS)])
    expected = seconds  # at first; weights by what was measured alone would favour the calls that were fast
    for _ in range(_ROUNDS):
        scale = np.sqrt(weights) / expected
        points, *_ = np.linalg.lstsq(hats[:, known] * scale[:, None], seconds * scale, rcond=None)
        expected = hats[:, known] @ points
    return {int(count): float(point) for count, point in zip(counts[known], points, strict=True)}


def _line(counts: Array, seconds: Array) -> Line:
    """Least squares, with no part below 0."""
    if len(np.unique(counts)) < 2:
        return Line(0.0, float(seconds.mean() / counts.mean()))
    each, fixed = np.polyfit(counts, seconds, 1)
    if each < 0:
        return Line(float(seconds.mean()), 0.0)
    return Line(float(fixed), float(each)) if fixed >= 0 else Line(0.0, float(seconds.mean() / counts.mean()))


def loop_gaps(runs: Iterable[Sequence[LoggedCall]]) -> Line:
    """Seconds between two UNet calls while there was something to step, by the rows of the first."""
    pairs = []
    for calls in runs:
        steps = [call for call in calls if call.component == "unet"]
        pairs += [(one.rows, after.started - one.ended) for one, after in pairwise(steps)]
    kept = np.array([pair for pair in pairs if pair[1] < _LONGEST_GAP])
    return _line(kept[:, 0], kept[:, 1])
