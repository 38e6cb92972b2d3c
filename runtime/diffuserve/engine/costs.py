"""What UNet calls cost, as measured: the only source of every estimate of time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

import numpy as np

__all__ = ["CALIBRATION_ROWS", "Group", "Medians", "StepCosts"]

_WINDOW: Final = 9  # measurements of one kind that are remembered; their median is the estimate
_CALLS_WINDOW: Final = 129  # the same for UNet calls of one row count
_GROUPS: Final = 512  # that are remembered: clients choose the sizes, and there are thousands
_LATELY: Final = 64  # calls that tell how fast the machine is now
_UNMEASURED_S: Final = 0.1  # one row at 512x512, before anything was measured
_UNMEASURED_PIXELS: Final = 512 * 512
_FRESH: Final = 16  # measurements after which decisions are made anew; one by one they only show noise
_ANY_LENGTH: Final = 0  # of requests: whatever their steps
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


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is known of one group's calls, by row count in ascending order.

    Replaced as a whole and never changed: the loop's thread measures while others ask.
    """

    rows: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()  # medians of the windows
    windows: tuple[tuple[float, ...], ...] = ()  # the last measurements, the newest last
    number: int = 0  # of its last measurement, among all groups'

    def observe(self, rows: int, seconds: float, number: int) -> _Measured:
        at = bisect_left(self.rows, rows)
        after = at + (rows in self.rows)
        (before,) = self.windows[at:after] or ((),)
        window = (*before[1 - _CALLS_WINDOW :], seconds)
        return _Measured(
            (*self.rows[:at], rows, *self.rows[after:]),
            (*self.seconds[:at], median(window), *self.seconds[after:]),
            (*self.windows[:at], window, *self.windows[after:]),
            number,
        )

    def usual(self, rows: int) -> float:
        """Seconds of a call of `rows` rows: as measured, or on the line through the two counts nearest to it."""
        if len(self.rows) == 1:
            return self.seconds[0] * (_FIXED_SHARE + (1 - _FIXED_SHARE) * rows / self.rows[0])
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        low_s, high_s = self.seconds[at - 1], self.seconds[at]
        slope = (high_s - low_s) / (high - low)
        if rows > high:  # never cheaper than the largest that was measured, nor a row dearer than its average
            return high_s + (rows - high) * min(max(slope, 0.0), high_s / high)
        return max(low_s + (rows - low) * slope, low_s * min(1.0, rows / low))

    def line(self) -> tuple[float, float]:
        """Seconds of a call, and of each row in it: least squares of the relative errors."""
        if len(self.rows) < 2:
            return 0.0, 0.0
        rows, seconds = np.array(self.rows, dtype=np.float64), np.array(self.seconds)
        (fixed, row), *_ = np.linalg.lstsq(np.stack([1 / seconds, rows / seconds], 1), np.ones(len(rows)), rcond=None)
        return max(0.0, float(fixed)), float(row)


class StepCosts:
    """Seconds of a UNet call by its group and row count.

    A row count that was not measured lies on the line between its measured neighbours, or beyond the last two; a
    group that was not measured is taken from one of the same checkpoint, in proportion to its pixels. All are made
    longer or shorter by half of what the last calls were slower or faster than estimated (their ratio's square root):
    machines have faster and slower minutes, and the other half is chance.

    Calls with prompts of several chunks, which take a little longer, are kept apart, so that estimates and decisions
    for all others do not depend on who came beside them: only by how much they are longer is learnt.

    One thread observes calls, and any may ask. The groups that were measured longest ago are forgotten.
    """

    def __init__(self) -> None:
        self._measured: dict[Group, _Measured] = {}
        self._observed = 0
        self._longer = Medians(window=_CALLS_WINDOW)
        self._lately: tuple[float, ...] = ()
        self._pace = 1.0
        self._around_steps = Medians()
        # Of many requests: who comes beside one is chance, and only what is usual is to be learnt.
        self._optimism = Medians(window=41, at_least=8)
        self._efficient: dict[tuple[Group, int, float], int] = {}
        self._news = 0

    def observe(self, group: Group, rows: int, seconds: float, chunks: int = 1) -> None:
        """Remember what a call took, whose prompts had so many chunks."""
        if chunks > 1 and self._nearest(group):
            self._longer.observe((group.checkpoint, chunks), seconds / self.seconds(group, rows))
            return
        before = self._measured.get(group)
        if before is not None and rows in before.rows:
            self._lately = (*self._lately[1 - _LATELY :], seconds / before.usual(rows))
            self._pace = math.sqrt(median(self._lately))
            self._news += 1
        else:
            self._news = _FRESH
        self._observed += 1
        self._remember(group, (before or _Measured()).observe(rows, seconds, self._observed))
        if self._news >= _FRESH:
            self._news = 0
            self._efficient = {}

    def _remember(self, group: Group, measured: _Measured) -> None:
        if group in self._measured:
            self._measured[group] = measured
            return
        # Replaced, since another thread may be looking through it.
        kept = {**self._measured, group: measured}
        if len(kept) > _GROUPS:
            del kept[min(kept, key=lambda one: kept[one].number)]
        self._measured = kept

    def seconds(self, group: Group, rows: int, chunks: int = 1) -> float:
        """The estimate for a call of that many rows, with prompts of that many chunks."""
        seconds = self._pace * self._usual(group, rows)
        return seconds if chunks == 1 else seconds * self._longer.get((group.checkpoint, chunks), 1.0)

    def _usual(self, group: Group, rows: int) -> float:
        measured = self._measured.get(group)
        return self._from_another_size(group, rows) if measured is None else measured.usual(rows)

    def _from_another_size(self, group: Group, rows: int) -> float:
        nearest = self._nearest(group)
        if nearest is None:
            return _UNMEASURED_S * rows * group.pixels / _UNMEASURED_PIXELS
        size, measured = nearest
        return measured.usual(rows) * group.pixels / size.pixels

    def _nearest(self, group: Group) -> tuple[Group, _Measured] | None:
        """The measured size of the same checkpoint that is most like it, and what is known of it."""
        others = [one for one in self._measured.items() if one[0].checkpoint == group.checkpoint]
        return min(others, key=lambda one: abs(one[0].pixels - group.pixels), default=None)

    def efficient_rows(self, group: Group, most: int, efficiency: float) -> int:
        """The fewest rows, up to `most`, at which a call makes `efficiency` of the rows a second that huge ones would.

        From the straight line through all that was measured, fixed + row * rows, since single measurements are noisy:
        rows / seconds reaches that share of 1 / row where rows = efficiency / (1 - efficiency) * fixed / row.
        """
        key, known = (group, most, efficiency), self._efficient
        if key not in known:
            fixed, row = self._line(group)
            enough = efficiency / (1 - efficiency) * fixed / row if row > 0 else most
            known[key] = max(1, min(most, math.ceil(enough)))
        return known[key]

    def _line(self, group: Group) -> tuple[float, float]:
        if (measured := self._measured.get(group)) is not None:
            return measured.line()
        nearest = self._nearest(group)
        return (0.0, 0.0) if nearest is None else nearest[1].line()

    def observe_request(self, kind: Hashable, steps: int, around: float, forecast: float, actual: float) -> None:
        """Remember a request of so many UNet calls that is done: the seconds that it spent outside of stepping, and all
        of its seconds beside what had been forecast.
        """
        self._around_steps.observe(kind, around)
        if forecast > 0:
            for length in (_ANY_LENGTH, steps.bit_length()):
                self._optimism.observe(length, min(max(actual / forecast, 0.5), 4.0))

    def around(self, kind: Hashable) -> float:
        """Seconds that requests of a kind spend outside of stepping: text encoding, VAE decoding, the image file."""
        return self._around_steps.get(kind)

    def corrected(self, forecast: float, steps: int = _ANY_LENGTH) -> float:
        """A forecast made as long as requests lately turned out to be: it knows nothing of those still to come, which
        long ones meet more of, nor that first calls after a pause take longer, which short ones have more of. So it is
        as those of about as many steps turned out, within a factor of two, once there were some.
        """
        return forecast * self._optimism.get(steps.bit_length(), self._optimism.get(_ANY_LENGTH, 1.0))
