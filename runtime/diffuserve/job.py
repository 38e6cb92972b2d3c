"""One request on its way through the service: its images, its reply, and what is known of its times."""

from __future__ import annotations

import base64
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from diffuserve.engine import Demand, Eta, Track
from diffuserve.errors import CancelledError, DeadlineError, DiffuserveError, InternalError
from diffuserve.keeper import Stay
from diffuserve.lora.packing import Adapter
from diffuserve.request import Event, EventKind, ResolvedRequest
from diffuserve.snapshot import ImageState, Snapshot

__all__ = ["Job", "Reply", "shutting_down"]

_log: Final = logging.getLogger(__name__)


class Reply(Protocol):
    """One request's way back to its client. Called from several threads, one call at a time."""

    def send(self, event: Event, *, final: bool) -> None: ...

    def fail(self, error: DiffuserveError) -> None: ...

    def is_cancelled(self) -> bool: ...


class Job:
    """Counts a request's images, and answers the reply's end exactly once.

    `beginning` is the request and the state that its images begin in: of a new one, none was begun. `demands` is what
    they will take in UNet calls, `eta` what its client was told. Times are monotonic seconds.
    """

    def __init__(
        self,
        beginning: Snapshot,
        demands: Sequence[Demand],
        reply: Reply,
        request_id: str,
        trace: object | None,
    ) -> None:
        self.beginning, self.request_id, self.trace = beginning, request_id, trace
        self.resolved = beginning.resolved
        request = self.resolved.request
        #: Its place before text encoding and VAE decoding: priority, then the shorter one, as in the loop.
        self.urgency = (-request.priority, beginning.trajectory.evaluations)
        self.accepted_at = self._sent_at = time.monotonic()
        self.deadline = self.accepted_at + request.deadline_ms / 1000 if request.deadline_ms else None
        self.demands = tuple(demands)
        self.eta = Eta(0.0, 0.0)
        self.tracks: tuple[Track, ...] = ()
        self.ready_at = self.stepped_at = 0.0
        #: Its claim on its checkpoint's components.
        self.stay = Stay(self.resolved.checkpoint)
        self._told = False
        self._reply = reply
        self._left = len(beginning.images)
        self._pictured: set[int] = set()
        self._suspended: dict[int, ImageState] = {}
        self._ended = False
        self._lock = threading.Lock()
        #: Called once, with "done", "suspended" or the error's code, before the final response is sent.
        self.on_end: Callable[[Job, str], None] = lambda *_: None
        #: Makes the bytes of a snapshot.
        self.pack: Callable[[Snapshot], bytes] = lambda _: b""

    def present(self) -> list[Demand]:
        """What is left of its images' UNet calls."""
        if not self.tracks:
            return list(self.demands)
        return [track.demand() for track in self.tracks if track.remaining]

    @property
    def left(self) -> int:
        """How many of its images are no pictures yet."""
        return self._left

    def is_waiting(self) -> bool:
        """Whether none of its images has been stepped."""
        return not any(track.joined_at_step for track in self.tracks)

    def is_cancelled(self) -> bool:
        return self._ended or self._reply.is_cancelled()

    def let_go_of_pictures(self) -> None:
        """Free the pictures that it was given and its adapter, once they are its tracks' or are needed no more.

        It is part of circles of references, through its tracks, which Python may find much later.
        """
        if self.resolved.image is not None or self.resolved.adapter is not None:
            self._replace(self.resolved.without_pictures())

    def _replace(self, resolved: ResolvedRequest) -> None:
        self.resolved, self.beginning = resolved, replace(self.beginning, resolved=resolved)

    def adapt(self, adapter: Adapter | None) -> None:
        """Keep the adapter that its LoRAs make, until its images join the loop with it."""
        if adapter is not None:
            self._replace(replace(self.resolved, adapter=adapter, loras=adapter.told(self.resolved.loras)))

    def begin(self) -> None:
        """Raises CancelledError or DeadlineError where there is nothing to begin any more."""
        self.check()
        self.tell_queued()

    def check(self) -> None:
        """Raise CancelledError or DeadlineError where there is nothing to begin any more."""
        if self.is_cancelled():
            raise CancelledError("the client cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineError("the deadline passed before the first step; allow more time", steps_done=0)

    def tell_queued(self) -> None:
        """Tell a client that wants to see progress, once, when it can expect its pictures."""
        if self.resolved.request.progress_every and not self._told:
            self._told = True
            info = {"eta_ms": round(1000 * self.eta.seconds), "images": self.eta.images}
            self._send(self._event("queued", 0, 0, b"", info))

    def step(self, track: Track, index: int, done: int) -> None:
        every = self.resolved.request.progress_every
        if every and done % every == 0 and not track.is_done:
            info = {"joined_at_step": track.joined_at_step}
            self._send(self._event("progress", index, done, b"", info))

    def wants_preview(self, index: int) -> bool:
        """Whether a preview of that image would still come before its picture."""
        return index not in self._pictured and not self.is_cancelled()

    def preview(self, index: int, done: int, size: tuple[int, int], data: bytes) -> None:
        self._send(self._event("preview", index, done, data, {"width": size[0], "height": size[1]}))

    def image(self, track: Track, index: int, data: bytes) -> None:
        """One picture; the last one ends the request."""
        info = {
            **self.resolved.parameters(index),
            "joined_at_step": track.joined_at_step,
            "queued_s": round(track.started_at - self.accepted_at, 4),
            "run_s": round(time.monotonic() - track.started_at, 4),
            "eta_s": round(self.eta.seconds, 4),
            "prompt_chunks": self.resolved.reading.chunks,
        }
        if self.stay.waited:
            info["load_s"] = round(self.stay.waited, 4)
        if track.steps_before:
            info["resumed_at_step"] = track.steps_before
        self._send(self._event("image", index, self.beginning.trajectory.steps, data, info), image=True)

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended. Never raises."""
        ours = error if isinstance(error, DiffuserveError) else InternalError(f"a bug in the server: {error!r}")
        with self._lock:
            if not self._end(ours.code):
                return
            try:
                self._reply.fail(ours)
            except Exception:  # there is no other way to this client, and others' requests are not to suffer for it
                _log.exception("an error could not be sent", extra={"request_id": self.request_id})

    def guarded(self, act: Callable[[], None]) -> bool:
        """Do something for it; if that raises, the request ends with the error. Whether it went well."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, DiffuserveError):
                _log.exception("a request failed", extra={"request_id": self.request_id})
            self.fail(error)
            return False
        return True

    def suspend(self, *states: ImageState) -> None:
        """Images that are not stepped any further here. When no other is left, the snapshot ends the request."""
        with self._lock:
            if not self._ended:
                self._suspended |= {one.index: one for one in states}
                self._hand_over()

    def beat(self, now: float) -> float:
        """Send a heartbeat where nothing was sent for as long as the client asked; seconds until the next is due."""
        every = self.resolved.request.heartbeat_ms / 1000
        with self._lock:
            if self._ended or not every:
                return math.inf
            if now - self._sent_at >= every:
                self._sent_at = now
                self._reply.send(self._event("heartbeat", 0, 0, b"", {}), final=False)
            return self._sent_at + every - now

    def _event(self, kind: EventKind, index: int, step: int, data: bytes, info: dict[str, Any]) -> Event:
        resolved = self.resolved
        return Event(
            kind=kind,
            index=index,
            step=step,
            steps=self.beginning.trajectory.steps,
            seed=resolved.seed + index,
            data=base64.b64encode(data) if resolved.request.image_encoding == "base64" else data,
            info=info,
        )

    def _send(self, event: Event, image: bool = False) -> None:
        with self._lock:
            if self._ended or event.index in self._pictured:  # a preview that was slower than its picture
                return
            if image:
                self._pictured.add(event.index)
                self._left -= 1
            final = self._left == 0
            if final:
                self._end("done")
            self._sent_at = time.monotonic()
            self._reply.send(event, final=final)
            if image:
                self._hand_over()

    def _hand_over(self) -> None:
        """The snapshot, once every image that is left was suspended."""
        if not self._suspended or len(self._suspended) < self._left:
            return
        states = tuple(self._suspended[index] for index in sorted(self._suspended))
        data = self.pack(replace(self.beginning, images=states).cut())
        event = self._event("snapshot", 0, min(one.steps for one in states), data, {"images": sorted(self._suspended)})
        if self._end("suspended"):
            self._reply.send(event, final=True)

    def _end(self, outcome: str) -> bool:
        """Whether this is the end; the second one is none. Told before the client hears, who may ask again at once."""
        if self._ended:
            return False
        self._ended = True
        self.let_go_of_pictures()
        if self.resolved.control is not None:
            self._replace(replace(self.resolved, control=None))
        self.on_end(self, outcome)
        return True


def shutting_down() -> CancelledError:
    return CancelledError("the server is shutting down")
