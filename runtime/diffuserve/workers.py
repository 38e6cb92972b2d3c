"""Threads that do the most urgent thing first."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from queue import PriorityQueue
from typing import Final

__all__ = ["Urgency", "Workers"]

_log: Final = logging.getLogger(__name__)

#: Compared from the left; the smallest goes first.
Urgency = tuple[float, ...]

_END: Final[Urgency] = (math.inf,)


class Workers:
    """A few threads over one queue. What is submitted must not raise: it has clients to tell."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: PriorityQueue[tuple[Urgency, int, Callable[[], object] | None]] = PriorityQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._lock = threading.Lock()
        #: When each thread began what it does, in monotonic seconds.
        self._began = [math.inf] * count
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: Urgency, act: Callable[[], object]) -> bool:
        """Have `act` called, before what is less urgent. False, and nothing is done, once it is closed."""
        with self._lock:
            if not self._closed:
                self._queue.put((urgency, next(self._numbers), act))
            return not self._closed

    def stalled(self) -> float:
        """Seconds that what has been under way for longest has taken so far; 0 where nothing is."""
        return max(0.0, time.monotonic() - min(self._began))

    def close(self) -> None:
        """Do what was submitted, and end."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put((_END, next(self._numbers), None))
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        while (act := self._queue.get()[2]) is not None:
            self._began[number] = time.monotonic()
            try:
                act()
            except Exception:
                _log.exception("a worker's task raised")
            self._began[number] = math.inf
            del act  # it holds a request's tensors, and the next one may be long in coming
