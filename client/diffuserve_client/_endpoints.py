"""Which of several servers a request goes to. No IO, and no clock of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from diffuserve_client._retry import Retry

__all__ = ["Endpoint", "Endpoints"]

_FORGOTTEN_AFTER_S: Final = 30.0  # others' load is as of the last request, and counts less and less until then


@dataclass(slots=True)
class Endpoint:
    """What is known of one server.

    `in_flight`: images that this client has there. `others`: images of other clients there at `told_at`. It is not
    to be asked before `closed_until`, which `failures` in a row brought about, nor before `full_until`.
    """

    url: str
    in_flight: int = 0
    others: int = 0
    told_at: float = -math.inf
    closed_until: float = -math.inf
    full_until: float = -math.inf
    failures: int = 0

    def wait(self, now: float) -> float:
        """Seconds until it may be asked."""
        return max(0.0, self.closed_until - now, self.full_until - now)

    @property
    def is_tried_out(self) -> bool:
        """Whether a request is finding out if it is back."""
        return self.failures > 0 and self.in_flight > 0

    def load(self, now: float) -> float:
        """Images that are likely there."""
        age = now - self.told_at
        return self.in_flight + self.others * max(0.0, 1.0 - age / _FORGOTTEN_AFTER_S)


class Endpoints:
    """The servers of a client, for all its requests. Threads may share it."""

    def __init__(self, urls: Iterable[str], retry: Retry, clock: Callable[[], float]) -> None:
        self._all = [Endpoint(url) for url in urls]
        self._retry = retry
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._all)

    def wait(self) -> float:
        """Seconds until one may be asked; 0 where one may now."""
        with self._lock:
            now = self._clock()
            return min(one.wait(now) for one in self._all)

    def take(self, images: int) -> Endpoint:
        """The least loaded one that may be asked, else the one that may be soonest. `images` are counted as there."""
        with self._lock:
            now = self._clock()
            self._turn += 1
            turn = self._turn
            count = len(self._all)

            def rank(place: int) -> tuple[float, bool, float, int]:
                one = self._all[place]
                # One request is enough to learn that a server is still lost. Equal ones take turns.
                return one.wait(now), one.is_tried_out, one.load(now), (place - turn) % count

            chosen = self._all[min(range(count), key=rank)]
            chosen.in_flight += images
            return chosen

    def release(self, endpoint: Endpoint, images: int) -> None:
        """Those images are there no more."""
        with self._lock:
            endpoint.in_flight -= images

    def works(self, endpoint: Endpoint, *, has_room: bool) -> None:
        """It answered; `has_room`: with an image, whose place is free now."""
        with self._lock:
            endpoint.failures = 0
            endpoint.closed_until = -math.inf
            if has_room:
                endpoint.full_until = -math.inf

    def told(self, endpoint: Endpoint, images: int) -> None:
        """It said how many images it has in all."""
        with self._lock:
            endpoint.others = max(0, images - endpoint.in_flight)
            endpoint.told_at = self._clock()

    def failed(self, endpoint: Endpoint) -> None:
        """It is lost, shutting down or not ready."""
        with self._lock:
            now = self._clock()
            if now >= endpoint.closed_until:  # the requests that were lost together are one failure
                endpoint.failures += 1
                endpoint.closed_until = now + self._retry.pause(endpoint.failures)

    def full(self, endpoint: Endpoint, seconds: float) -> None:
        """It has no room for that long."""
        with self._lock:
            endpoint.full_until = max(endpoint.full_until, self._clock() + seconds)
