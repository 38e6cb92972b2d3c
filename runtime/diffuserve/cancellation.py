"""Hearing that clients cancelled, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, Protocol

__all__ = ["CancelWatch", "Cancellable"]

_log: Final = logging.getLogger(__name__)

_REST_S: Final = 0.005
_RESTS_PER_ROUND: Final = 10


class Cancellable(Protocol):
    def ask(self) -> bool:
        """Find out whether its client cancelled, and remember it. False once there is nothing more to ask."""
        ...


class CancelWatch:
    """Asks all that are watched, over and over, so that nobody else waits for an answer.

    Asking crosses to the server's process and takes about 0.1 ms: with 16 requests under way it took 1.5 ms of every
    step on the loop's thread, while the engine stood still. Here a tenth of one thread's time is spent on asking:
    one request is asked every 5 ms, 16 are asked every 16 ms, within one step of most engines.
    """

    def __init__(self) -> None:
        self._watched: dict[Cancellable, None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cancel-watch", daemon=True)
        self._thread.start()

    def add(self, one: Cancellable) -> None:
        with self._changed:
            self._watched[one] = None
            self._changed.notify()

    def discard(self, one: Cancellable) -> None:
        with self._changed:
            self._watched.pop(one, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        rest = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, rest)
                self._changed.wait_for(lambda: self._closed or self._watched)
                if self._closed:
                    return
                watched = list(self._watched)
            started = time.monotonic()
            for one in watched:
                self._ask(one)
            rest = max(_REST_S, _RESTS_PER_ROUND * (time.monotonic() - started))

    def _ask(self, one: Cancellable) -> None:
        try:
            again = one.ask()
        except Exception:
            _log.exception("a request could not be asked whether it was cancelled")
            again = False
        if not again:
            self.discard(one)
