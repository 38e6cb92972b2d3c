"""Pictures of what a request is becoming, made beside the loop and never waited for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Final

from diffuserve.errors import DiffuserveError
from diffuserve.workers import Urgency, Workers

__all__ = ["Previews"]

_log: Final = logging.getLogger(__name__)


class Previews:
    """A thread that makes one preview after another, of each image the newest.

    Of one image at most one waits: a newer one takes its place, so that a thread that is too slow skips some and keeps
    no more than one prediction an image. A preview that fails is logged, and its request goes on without it.
    """

    def __init__(self) -> None:
        self._workers = Workers(1, "previews")
        self._waiting: dict[Hashable, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def offer(self, image: Hashable, urgency: Urgency, make: Callable[[], None]) -> None:
        """Have `make` called, unless a newer one is offered for the same image before its turn. Returns at once."""
        with self._lock:
            is_queued = image in self._waiting
            self._waiting[image] = make
        if not is_queued:
            self._workers.submit(urgency, partial(self._make, image))

    def close(self) -> None:
        """Make what was offered, and end."""
        self._workers.close()

    def _make(self, image: Hashable) -> None:
        with self._lock:
            make = self._waiting.pop(image)
        try:
            make()
        except DiffuserveError as error:
            _log.warning("a preview could not be made: %s", error)
