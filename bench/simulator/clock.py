"""Virtual time, and what takes time on it: a machine that calls share, models that take one call at a time."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Clock", "Device", "Lane"]

Act = Callable[[], None]

_DONE: Final = 1e-9  # seconds of work that are nothing: what is left of a sum of floats


class Clock:
    """Seconds that pass only from one event to the next. Equal times keep the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Act]] = []
        self._numbers = itertools.count()

    def at(self, time: float, act: Act) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), act))

    def after(self, seconds: float, act: Act) -> None:
        self.at(self.now + seconds, act)

    def run(self) -> None:
        """Let everything happen."""
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()


@dataclass(slots=True, eq=False)
class _Call:
    left: float  # seconds that it would still take alone
    done: Act


class Device:
    """A machine's cores, or its card. Calls that run side by side share it in equal parts.

    Together they make `sharing` times the progress that one makes alone: 1 where a single call uses all there is, more
    where calls leave parts idle that others can use.
    """

    def __init__(self, clock: Clock, sharing: float) -> None:
        if sharing <= 0:
            raise ValueError(f"sharing is {sharing}, and must be above 0")
        self._clock, self._sharing = clock, sharing
        self._calls: list[_Call] = []
        self._since = 0.0
        self._plans = 0
        #: Seconds in which anything ran.
        self.busy = 0.0

    def start(self, seconds: float, done: Act) -> None:
        """Run a call that takes `seconds` alone; `done` is called when it is done."""
        self._progress()
        self._calls.append(_Call(seconds, done))
        self._plan()

    def _rate(self) -> float:
        return 1.0 if len(self._calls) == 1 else self._sharing / len(self._calls)

    def _progress(self) -> None:
        passed, self._since = self._clock.now - self._since, self._clock.now
        if self._calls:
            self.busy += passed
            progress = passed * self._rate()
            for call in self._calls:
                call.left -= progress

    def _plan(self) -> None:
        """Wake up when the next call will be done, unless others change that before."""
        self._plans += 1
        plan = self._plans
        if self._calls:
            soonest = max(0.0, min(call.left for call in self._calls))
            self._clock.after(soonest / self._rate(), lambda: self._wake(plan))

    def _wake(self, plan: int) -> None:
        if plan != self._plans:
            return
        self._progress()
        limit = max(_DONE, min(call.left for call in self._calls))
        done = [call for call in self._calls if call.left <= limit]
        self._calls = [call for call in self._calls if call.left > limit]
        self._plan()
        for call in done:
            call.done()


class Lane:
    """A model of one instance: one call at a time, in the order in which they come."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._waiting: deque[_Call] = deque()
        self._running = False

    def call(self, seconds: float, done: Act) -> None:
        self._waiting.append(_Call(seconds, done))
        if not self._running:
            self._next()

    def _next(self) -> None:
        self._running = bool(self._waiting)
        if self._running:
            call = self._waiting.popleft()
            self._device.start(call.left, lambda: self._ended(call))

    def _ended(self, call: _Call) -> None:
        self._next()
        call.done()
