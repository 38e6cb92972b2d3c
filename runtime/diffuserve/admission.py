"""Requests with pictures, snapshots or LoRAs, read beside Triton's thread and within a limit of memory.

Triton calls the model on one thread. A picture of 4096 x 4096 pixels takes half a second to decode, also where its file
has 2 kB, and a large file of LoRA as long to read. While that thread is busy no request is accepted and nobody is told
how the server is.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from diffuserve.errors import CancelledError, DiffuserveError, InvalidArgumentError, QueueFullError
from diffuserve.heartbeats import Heartbeats
from diffuserve.job import Reply
from diffuserve.request import Event, GenerateRequest
from diffuserve.workers import Workers

__all__ = ["MAX_GIVEN_BYTES", "Admission"]

#: Of all pictures and snapshots that requests in the server came with. So many are read within the clients' patience.
MAX_GIVEN_BYTES: Final = 256 << 20
_WORKERS: Final = 2


class Submit(Protocol):
    """A service's `submit`."""

    def __call__(self, request: GenerateRequest, reply: Reply, *, request_id: str, trace: object | None) -> None: ...


class Admission:
    """Submits requests to a service; those with something to read from threads of its own.

    `refused` is told of one of these that the service did not accept. `heartbeats` beat for those that wait to be read,
    as for those that the service has.
    """

    def __init__(
        self, submit: Submit, refused: Callable[[Reply, str, Exception], None], heartbeats: Heartbeats
    ) -> None:
        self._submit, self._refused, self._heartbeats = submit, refused, heartbeats
        self._workers = Workers(_WORKERS, "admission")
        self._held = 0
        self._lock = threading.Lock()

    def submit(self, request: GenerateRequest, reply: Reply, *, request_id: str, trace: object | None) -> None:
        """Raises what the service raises for a request with nothing to read; for another InvalidArgumentError,
        QueueFullError or CancelledError.
        """
        size = request.given_bytes
        if not size and not request.loras:
            self._submit(request, reply, request_id=request_id, trace=trace)
            return
        self._hold(size)
        held = _HeldReply(reply, request.heartbeat_ms / 1000, partial(self._release, size))
        admit = partial(self._admit, request, held, request_id, trace)
        if not self._workers.submit((-request.priority,), admit):
            self._release(size)
            raise CancelledError("the server is shutting down")
        self._heartbeats.add(held)

    def close(self) -> None:
        """Admit what waits, and end."""
        self._workers.close()

    def _admit(self, request: GenerateRequest, reply: _HeldReply, request_id: str, trace: object | None) -> None:
        try:
            self._submit(request, reply, request_id=request_id, trace=trace)
        except Exception as error:
            self._refused(reply, request_id, error)
        reply.is_read = True

    def _hold(self, size: int) -> None:
        if size > MAX_GIVEN_BYTES:
            raise InvalidArgumentError(
                f"the request's pictures and snapshot have {size} bytes, and at most {MAX_GIVEN_BYTES} are taken; make "
                "them smaller",
                value=size,
                maximum=MAX_GIVEN_BYTES,
            )
        with self._lock:
            if self._held + size > MAX_GIVEN_BYTES:
                raise QueueFullError(
                    f"the pictures and snapshots of the requests in the server have {self._held} bytes, this one's "
                    f"{size}, and together at most {MAX_GIVEN_BYTES} are taken; send it again later, or smaller",
                    value=self._held + size,
                    maximum=MAX_GIVEN_BYTES,
                )
            self._held += size

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size


class _HeldReply:
    """A reply that tells when its request is over, and beats, `every` so many seconds, until it is read."""

    def __init__(self, reply: Reply, every: float, over: Callable[[], None]) -> None:
        self._reply, self._every, self._over = reply, every, over
        self._beat_at = time.monotonic()
        self._lock = threading.Lock()  # nothing is sent after the last answer
        self.is_read = not every

    def send(self, event: Event, *, final: bool) -> None:
        try:
            with self._lock:
                self.is_read |= final
                self._reply.send(event, final=final)
        finally:
            if final:
                self._over()

    def fail(self, error: DiffuserveError) -> None:
        try:
            with self._lock:
                self.is_read = True
                self._reply.fail(error)
        finally:
            self._over()

    def is_cancelled(self) -> bool:
        return self._reply.is_cancelled()

    def beat(self, now: float) -> float:
        """As heartbeats.Beating."""
        with self._lock:
            if self.is_read:
                return math.inf
            if now - self._beat_at >= self._every:
                self._beat_at = now
                self._reply.send(Event(kind="heartbeat", info={}), final=False)
            return self._beat_at + self._every - now
