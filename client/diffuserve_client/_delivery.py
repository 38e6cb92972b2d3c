"""One request from its first try to its last picture, over as many tries and servers as it takes. No IO.

    while not delivery.is_done:
        sleep(delivery.wait())
        attempt = delivery.attempt()
        try:
            for event in <the stream of attempt.exchange at attempt.url>:
                event = delivery.take(event)  # None where it was delivered before, or nobody asked for it
            delivery.ended()
        except DiffuserveError as error:
            delivery.failed(error)  # raises where that was the last try, and pictures are missing
        finally:
            delivery.release()

The synchronous and the asynchronous client are two ways to run this loop.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from diffuserve.errors import (
    ComponentFailedError,
    DeadlineError,
    DiffuserveError,
    DrainingError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
    UnsupportedError,
)
from diffuserve.request import RANDOM_SEED, Event, GenerateRequest
from diffuserve_client._endpoints import Endpoint, Endpoints
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._events import typed
from diffuserve_client._exchange import Exchange
from diffuserve_client._retry import Retry
from diffuserve_client._timeout import Timeout

__all__ = ["Attempt", "Delivery"]

_log: Final = logging.getLogger("diffuserve_client")

_SEED_BOUND: Final = 2**32  # as the server draws them: short enough to be typed
_LATER_BY_CHANCE: Final = 0.25  # of the wait, so that those who wait together do not come together
#: Errors of a server rather than of a request.
_LOSSES: Final = (ConnectionFailedError, UnavailableError, ComponentFailedError)
_LEAST_ROOM_S: Final = 0.1  # a full server that expects room at once still has to make it


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try: what to exchange with which server."""

    url: str
    exchange: Exchange


class Delivery:
    """The tries of one request.

    `request` is the request with its seed drawn, so that every try makes the same pictures. Each image is delivered
    once; a later try asks only for those that are missing, or goes on from the snapshot of a server that shut down.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        request_id: str,
        endpoints: Endpoints,
        retry: Retry,
        timeout: Timeout,
        clock: Callable[[], float],
    ) -> None:
        if request.seed == RANDOM_SEED and not request.resume:
            request = replace(request, seed=secrets.randbelow(_SEED_BOUND))
        self.request: Final = request
        self.request_id: Final = request_id
        self.is_done = False
        self._endpoints = endpoints
        self._retry = retry
        self._timeout = timeout
        self._clock = clock
        self._deadline: float | None = None  # from the first try on
        self._delivered: set[int] = set()
        self._failures = 0
        self._component_failures = 0
        self._full: set[str] = set()  # the servers whose last word to this request was that they have no room
        self._last_error: DiffuserveError | None = None
        #: A snapshot to go on from, and the index of its first image here; the caller's own is tried as any request.
        self._snapshot: bytes = request.resume
        self._offset = 0
        self._endpoint: Endpoint | None = None
        self._counted = 0

    @property
    def left(self) -> float:
        """Seconds that the request still has. They begin to run when this is asked for first."""
        if self._deadline is None:
            self._deadline = self._clock() + self._timeout.total
        return self._deadline - self._clock()

    @property
    def _useful(self) -> float:
        """As `left`, but until the request's own deadline, which servers keep: it too counts from the first try."""
        due = self.request.deadline_ms / 1000 or math.inf
        return min(self.left, self.left - self._timeout.total + due)

    def wait(self) -> float:
        """Seconds to wait before the next try. Raises the last error where they are more than are left."""
        if not self._retry.retries:
            return 0.0
        wait = self._endpoints.wait()
        if self._last_error is None:
            return wait if wait < self._useful else 0.0  # then an error is told soon, rather than late and by the clock
        wait *= 1 + _LATER_BY_CHANCE * random.random()
        if wait >= self._useful:
            raise self._final(self._last_error)
        # Once for each try, with the words of the error that it is to mend.
        _log.info("%s; trying again%s", self._last_error.message, f" in {wait:.1f} s" if wait else "")
        return wait

    def attempt(self) -> Attempt:
        """The next try, now. Raises DeadlineError where no time is left."""
        if self._useful <= 0:
            if self._last_error is not None:
                raise self._final(self._last_error)
            raise DeadlineError(
                f"the request was not sent within {self._timeout.total:g} s; allow a longer timeout",
                timeout=self._timeout.total,
            )
        request = self._request()
        if request.deadline_ms:
            elapsed = max(0.0, self._timeout.total - self.left)
            request = replace(request, deadline_ms=max(1, request.deadline_ms - int(1000 * elapsed)))
        self._counted = request.num_images
        self._endpoint = self._endpoints.take(self._counted)
        exchange = Exchange(
            request,
            url=self._endpoint.url,
            timeout=self._timeout,
            request_id=self.request_id,
            # Who has a choice wants to know of each server's load, which is told with the ETA.
            wants_queued=len(self._endpoints) > 1,
        )
        return Attempt(self._endpoint.url, exchange)

    def _request(self) -> GenerateRequest:
        """The request for the images that are missing."""
        if self._snapshot:
            if self.request.resume:
                return replace(self.request, resume=self._snapshot)
            return GenerateRequest(prompt="", resume=self._snapshot).answered_as(self.request)
        if not self._delivered:
            self._offset = 0
            return self.request
        missing = set(range(self.request.num_images)) - self._delivered
        self._offset = min(missing)
        count = max(missing) - self._offset + 1
        return replace(self.request, seed=self.request.seed + self._offset, num_images=count)

    def take(self, event: Event) -> Event | None:
        """The event as the caller's: of the image that it asked for. None where it has that one already."""
        assert self._endpoint is not None
        self._endpoints.works(self._endpoint, has_room=event.kind == "image")
        if event.kind == "queued":
            if "images" in event.info:
                self._endpoints.told(self._endpoint, int(event.info["images"]))
            return typed(event) if self.request.progress_every else None
        if event.kind == "snapshot":
            self._snapshot = event.data
            return typed(event)
        if event.kind == "progress" and not self.request.progress_every:
            return None
        index = event.index + self._offset
        if event.kind in ("image", "preview", "progress") and index in self._delivered:
            return None
        if event.kind == "image":
            self._delivered.add(index)
        return typed(event, index=index) if self._offset else typed(event)

    def ended(self, *, handed_over: bool) -> None:
        """The stream ended as it should: with every picture, or with a snapshot of what is left."""
        self._release()
        if not handed_over:
            self.is_done = True
            return
        assert self._endpoint is not None
        self.failed(
            DrainingError(
                f"the server at {self._endpoint.url} was shut down before all pictures were done; go on elsewhere with "
                "Client.resume and this error's detail `snapshot`",
                snapshot=self._snapshot,
            )
        )

    def failed(self, error: DiffuserveError) -> None:
        """A try failed. Raises the error where there is none after it, and pictures are missing."""
        endpoint = self._endpoint
        assert endpoint is not None
        self._release()
        self._note(error, endpoint)
        if self._lacks_nothing(error):
            self.is_done = True
        elif self._refuses_snapshot(error):
            self._snapshot = b""  # of this client's making: the request is begun again instead
        elif not self._may_retry(error, endpoint.url):
            raise self._final(error)
        self._last_error = error

    def release(self) -> None:
        """The try is over, however it ended."""
        self._release()

    def _release(self) -> None:
        if self._counted and self._endpoint is not None:
            self._endpoints.release(self._endpoint, self._counted)
        self._counted = 0

    def _lacks_nothing(self, error: DiffuserveError) -> bool:
        """Whether it was lost after its last picture, of which only the word that it was the last is missing."""
        # How many pictures a snapshot of the caller's has, only servers can read.
        return (
            isinstance(error, _LOSSES) and not self.request.resume and len(self._delivered) == self.request.num_images
        )

    def _refuses_snapshot(self, error: DiffuserveError) -> bool:
        return (
            bool(self._snapshot)
            and not self.request.resume
            and isinstance(error, (InvalidArgumentError, NotFoundError, UnsupportedError))
        )

    def _note(self, error: DiffuserveError, endpoint: Endpoint) -> None:
        """Remember what the error says of the server, for this client's other requests too."""
        if isinstance(error, QueueFullError):
            self._endpoints.full(endpoint, max(_LEAST_ROOM_S, _seconds(error.detail.get("eta_ms"), self._retry.first)))
        elif isinstance(error, DeadlineError):
            if "unreachable" in error.detail:
                self._endpoints.failed(endpoint)
        elif isinstance(error, _LOSSES):
            self._endpoints.failed(endpoint)

    def _may_retry(self, error: DiffuserveError, url: str) -> bool:
        if isinstance(error, DeadlineError) or not self._retry.retries:
            return False
        self._full.discard(url)
        if isinstance(error, QueueFullError):
            self._full.add(url)
            return True
        if isinstance(error, ComponentFailedError):
            self._component_failures += 1
            return self._component_failures < 2
        if not isinstance(error, _LOSSES):
            return False
        self._failures += 1
        if "tls" in error.detail and len(self._endpoints) == 1:
            return False  # which time does not mend
        # However often others fail meanwhile, one that is full is waited for.
        return bool(self._full) or self._failures < (self._retry.retries + 1) * len(self._endpoints)

    def _final(self, error: DiffuserveError) -> DiffuserveError:
        """The error for the caller: it says how often was tried, and has the snapshot that is still to go on from."""
        # One of a part of the request counts its images from that part's first, which nobody else knows.
        if self._snapshot != self.request.resume and not self._offset:
            error.detail.setdefault("snapshot", self._snapshot)
        if self._failures > 1:
            error.detail["tries"] = self._failures
            error.message = f"{error.message} (tried {self._failures} times)"
            error.args = (error.message,)
        return error


def _seconds(milliseconds: Any, otherwise: float) -> float:
    """What a server says, which may be anything."""
    return float(milliseconds) / 1000 if isinstance(milliseconds, (int, float)) else otherwise
