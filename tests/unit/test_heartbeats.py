"""The heartbeats' thread: nobody who comes, and no end, is missed while it is busy with others."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from diffuserve.heartbeats import Heartbeats


class Member:
    """Is due at once when it is added, and never again after the first beat that follows, during which it acts."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self._act, self._is_added = act, False
        self.has_beaten = threading.Event()

    def beat(self, now: float) -> float:
        if not self._is_added:
            self._is_added = True
            return 0.0
        self._act()
        self.has_beaten.set()
        return math.inf


def test_who_comes_during_a_round_beats_after_it() -> None:
    heartbeats, second = Heartbeats(), Member()
    heartbeats.add(Member(lambda: heartbeats.add(second)))
    assert second.has_beaten.wait(10)
    heartbeats.close()


def test_it_ends_although_it_is_closed_during_a_round() -> None:
    heartbeats, is_closing = Heartbeats(), threading.Event()
    closing = threading.Thread(target=heartbeats.close, daemon=True)

    def close() -> None:
        closing.start()
        while not heartbeats._closed:
            closing.join(0.001)
        is_closing.set()

    heartbeats.add(Member(close))
    assert is_closing.wait(10)
    closing.join(5)
    assert not closing.is_alive()
