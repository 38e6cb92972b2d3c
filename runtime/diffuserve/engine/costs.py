"""What UNet calls cost, as measured: the only source of every estimate of time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable
from statistics import median
from typing import Final, NamedTuple

import numpy as np

__all__ = ["CALIBRATION_ROWS", "Group", "Medians", "StepCosts"]

_WINDOW: Final = 9  # measurements of one kind that are remembered; their median is the estimate
_CALLS_WINDOW: Final = 33  # the same for UNet calls of one row count
_LATELY: Final = 10  # calls that tell how fast the machine is now
_UNMEASURED_S: Final = 0.1  # one row at 512x512, before anything was measured
_UNMEASURED_PIXELS: Final = 512 * 512
_FRESH: Final = 16  # measurements after which decisions are made anew; one by one they only show noise
_FIXED_SHARE: Final = 0.3  # of a call's time, where one row count only was measured
CALIBRATION_ROWS: Final = (1, 2, 4, 8, 16, 32, 64)


class Group(NamedTuple):
    """Images that may share a UNet call: one checkpoint, one size in pixels."""

    checkpoint: str
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


class Medians:
    """The median of the last few measurements of each kind, for a bounded number of kinds."""

    def __init__(self, kinds: int = 256, window: int = _WINDOW, at_least: int = 1) -> None:
        self._kinds, self._window, self._at_least = kinds, window, at_least
        # Values and their median, which is asked for far more often than a value comes.
        self._windows: OrderedDict[Hashable, tuple[tuple[float, ...], float]] = OrderedDict()

    def observe(self, kind: Hashable, value: float) -> None:
        before, _ = self._windows.get(kind, ((), 0.0))
        values = (*before[1 - self._window :], value)
        # Replaced and never missing in between: other threads read while one writes.
        self._windows[kind] = values, median(values)
        self._windows.move_to_end(kind)
        if len(self._windows) > self._kinds:
            self._windows.popitem(last=False)

    def get(self, kind: Hashable, default: float = 0.0) -> float:
        values, middle = self._windows.get(kind, ((), default))
        return middle if len(values) >= self._at_least else default


class StepCosts:
    """Seconds of a UNet call by its group and row count.

    A row count that was not measured lies on the line between its measured neighbours, or beyond the last two; a
    group that was not measured is taken from one of the same checkpoint, in proportion to its pixels. All are made
    longer or shorter by half of what the last calls were slower or faster than estimated (their ratio's square root):
    machines have faster and slower minutes, and the other half is chance.

    Calls with prompts of several chunks, which take a little longer, are kept apart, so that estimates and decisions
    for all others do not depend on who came beside them: only by how much they are longer is learnt.
    """

    def __init__(self) -> None:
        self._medians = Medians(kinds=4096, window=_CALLS_WINDOW)
        self._longer = Medians(window=_CALLS_WINDOW)
        self._lately: tuple[float, ...] = ()
        self._pace = 1.0
        self._rows: dict[Group, tuple[int, ...]] = {}
        self._around_steps = Medians()
        # Of many requests: who comes beside one is chance, and only what is usual is to be learnt.
        self._optimism = Medians(kinds=1, window=41, at_least=8)
        self._efficient: dict[tuple[Group, int, float], int] = {}
        self._news = 0

    def observe(self, group: Group, rows: int, seconds: float, chunks: int = 1) -> None:
        """Remember what a call took, whose prompts had so many chunks."""
        if chunks > 1 and self._nearest(group):
            self._longer.observe((group.checkpoint, chunks), seconds / self.seconds(group, rows))
            return
        measured = self._rows.get(group, ())
        if rows in measured:
            self._lately = (*self._lately[1 - _LATELY :], seconds / self._usual(group, rows))
            self._pace = math.sqrt(median(self._lately))
        self._medians.observe((group, rows), seconds)
        self._news += 1
        if rows not in measured:
            self._rows[group] = tuple(sorted((*measured, rows)))
            self._news = _FRESH
        if self._news >= _FRESH:
            self._news = 0
            self._efficient.clear()

    def seconds(self, group: Group, rows: int, chunks: int = 1) -> float:
        """The estimate for a call of that many rows, with prompts of that many chunks."""
        seconds = self._pace * self._usual(group, rows)
        return seconds if chunks == 1 else seconds * self._longer.get((group.checkpoint, chunks), 1.0)

    def _usual(self, group: Group, rows: int) -> float:
        measured = self._rows.get(group)
        if not measured:
            return self._from_another_size(group, rows)
        points = [(count, self._medians.get((group, count))) for count in self._neighbours(measured, rows)]
        if len(points) == 1:
            count, cost = points[0]
            return cost * (_FIXED_SHARE + (1 - _FIXED_SHARE) * rows / count)
        (low, low_s), (high, high_s) = points
        slope = (high_s - low_s) / (high - low)
        if rows > high:  # never cheaper than the largest that was measured, nor a row dearer than its average
            return high_s + (rows - high) * min(max(slope, 0.0), high_s / high)
        return max(low_s + (rows - low) * slope, low_s * min(1.0, rows / low))

    @staticmethod
    def _neighbours(measured: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """The measured row counts on both sides of `rows`, the two nearest ones at an end, or the only one."""
        if len(measured) == 1:
            return measured
        at = min(max(bisect_left(measured, rows), 1), len(measured) - 1)
        return measured[at - 1 : at + 1]

    def _from_another_size(self, group: Group, rows: int) -> float:
        nearest = self._nearest(group)
        if nearest is None:
            return _UNMEASURED_S * rows * group.pixels / _UNMEASURED_PIXELS
        return self._usual(nearest, rows) * group.pixels / nearest.pixels

    def _nearest(self, group: Group) -> Group | None:
        """The measured size of the same checkpoint that is most like it."""
        others = [other for other in self._rows if other.checkpoint == group.checkpoint]
        return min(others, key=lambda other: abs(other.pixels - group.pixels), default=None)

    def efficient_rows(self, group: Group, most: int, efficiency: float) -> int:
        """The fewest rows, up to `most`, at which a call makes `efficiency` of the rows a second that huge ones would.

        From the straight line through all that was measured, fixed + row * rows, since single measurements are noisy:
        rows / seconds reaches that share of 1 / row where rows = efficiency / (1 - efficiency) * fixed / row.
        """
        key = (group, most, efficiency)
        if key not in self._efficient:
            fixed, row = self._line(group)
            enough = efficiency / (1 - efficiency) * fixed / row if row > 0 else most
            self._efficient[key] = max(1, min(most, math.ceil(enough)))
        return self._efficient[key]

    def _line(self, group: Group) -> tuple[float, float]:
        """Seconds of a call, and of each row in it: least squares of the relative errors."""
        known = group if group in self._rows else self._nearest(group)
        measured = self._rows[known] if known else ()
        if len(measured) < 2:
            return 0.0, 0.0
        rows = np.array(measured, dtype=np.float64)
        seconds = np.array([self._medians.get((known, count)) for count in measured])
        (fixed, row), *_ = np.linalg.lstsq(np.stack([1 / seconds, rows / seconds], 1), np.ones(len(rows)), rcond=None)
        return max(0.0, float(fixed)), float(row)

    def observe_request(self, kind: Hashable, around: float, forecast: float, actual: float) -> None:
        """Remember a request that is done: the seconds that it spent outside of stepping, and all of its seconds
        beside what had been forecast.
        """
        self._around_steps.observe(kind, around)
        if forecast > 0:
            self._optimism.observe("", min(max(actual / forecast, 0.5), 4.0))

    def around(self, kind: Hashable) -> float:
        """Seconds that requests of a kind spend outside of stepping: text encoding, VAE decoding, the image file."""
        return self._around_steps.get(kind)

    def corrected(self, forecast: float) -> float:
        """A forecast made as long as requests lately turned out to be: it knows nothing of those still to come."""
        return forecast * self._optimism.get("", 1.0)
