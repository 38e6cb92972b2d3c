"""Signs of life to clients that asked for them, while a request waits or a step takes long."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final, Protocol

__all__ = ["Beating", "Heartbeats"]

_log: Final = logging.getLogger(__name__)


class Beating(Protocol):
    def beat(self, now: float) -> float:
        """Send a heartbeat if one is due (monotonic seconds); seconds until the next, infinite for never again."""
        ...


class Heartbeats:
    """One thread that lets each of its members beat when it is due, until that is never again."""

    def __init__(self) -> None:
        self._members: set[Beating] = set()
        self._changed = threading.Condition()
        self._added = self._closed = False
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def add(self, one: Beating) -> None:
        if one.beat(time.monotonic()) < math.inf:
            with self._changed:
                self._members.add(one)
                self._added = True
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        wait = math.inf
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._added, None if wait == math.inf else wait)
                if self._closed:
                    return
                self._added = False
            wait = self._round()

    def _round(self) -> float:
        """Let everyone beat who is due; seconds until the next one is.

        No member outlives it here: each holds a request's tensors, and the next round may be long in coming.
        """
        with self._changed:
            members = list(self._members)
        due = {one: self._beat(one) for one in members}
        with self._changed:
            self._members -= {one for one, seconds in due.items() if seconds == math.inf}
        return min(due.values(), default=math.inf)  # who came meanwhile makes the next round come at once

    @staticmethod
    def _beat(one: Beating) -> float:
        try:
            return one.beat(time.monotonic())
        except Exception:
            _log.exception("a heartbeat could not be sent")
            return math.inf
