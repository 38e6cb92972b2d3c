"""What became of each request: raw times, from which every figure is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from diffuserve.errors import DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._bench.load import Load

__all__ = ["INTERRUPTED", "Record", "Run"]

#: Stands for an error's code where the run was ended before the request was.
INTERRUPTED: Final = "interrupted"

#: What of a request is kept: what tells it from the others of a mix.
_ASKED: Final = ("prompt", "checkpoint", "steps", "sampler", "guidance_scale", "width", "height", "num_images", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request. Times are seconds since the run began, by the client's clock; None: it did not come to that.

    `arrived` is when it was to be sent and `sent` when it was; `queued`, `first_step` and `first_preview` when the
    server was first heard of them; `done` when its stream ended, after the last picture, or the error came. `error` is
    the error's code.
    `images` pictures came, each of `steps` steps. The server's own seconds: `queue_s` until its first step, `served_s`
    until its last picture, and `eta_s`, which it had expected of the latter.
    """

    index: int
    warm_up: bool
    arrived: float
    sent: float
    queued: float | None = None
    first_step: float | None = None
    first_preview: float | None = None
    done: float | None = None
    error: str | None = None
    message: str | None = None
    images: int = 0
    steps: int | None = None
    queue_s: float | None = None
    served_s: float | None = None
    eta_s: float | None = None
    asked: Mapping[str, Any]

    @classmethod
    def begun(cls, index: int, request: GenerateRequest, *, warm_up: bool, arrived: float, sent: float) -> Record:
        asked = {name: getattr(request, name) for name in _ASKED if getattr(request, name) is not None}
        return cls(index=index, warm_up=warm_up, arrived=arrived, sent=sent, asked=asked)

    def heard(self, event: Event, now: float) -> Record:
        """The record after an event that came at `now`."""
        if event.kind == "queued":
            return replace(self, queued=now, eta_s=event.info["eta_ms"] / 1000)
        if event.kind == "progress" and self.first_step is None:
            return replace(self, first_step=now)
        if event.kind == "preview" and self.first_preview is None:
            return replace(self, first_preview=now)
        if event.kind == "image":
            return self._pictured(event)
        return self

    def ended(self, now: float, error: DiffuserveError | None = None) -> Record:
        if error is None:
            return replace(self, done=now)
        return replace(self, done=now, error=error.code, message=error.message)

    def _pictured(self, event: Event) -> Record:
        info = event.info
        told = replace(
            self, images=self.images + 1, steps=info.get("steps", event.steps), eta_s=info.get("eta_s", self.eta_s)
        )
        if (queued := info.get("queued_s")) is None or (run := info.get("run_s")) is None:
            return told
        # Each picture of a request has its own; the request waits until the first, and is served with the last.
        before = queued if self.queue_s is None else min(queued, self.queue_s)
        return replace(told, queue_s=before, served_s=max(queued + run, self.served_s or 0.0))

    @property
    def is_done(self) -> bool:
        """Whether it was answered, with all of its pictures."""
        return self.done is not None and self.error is None

    @property
    def latency(self) -> float | None:
        """Seconds from its arrival to its last picture."""
        return self.done - self.arrived if self.done is not None and self.error is None else None


@dataclass(frozen=True, slots=True)
class Run:
    """One load kept up. Figures are of the window from `begin` to `end`, in seconds since the run began.

    `interrupted`: it was ended early.
    """

    load: Load
    begin: float
    end: float
    interrupted: bool
    records: Sequence[Record]

    @property
    def measured(self) -> list[Record]:
        """The requests that count."""
        return [one for one in self.records if not one.warm_up]

    def as_json(self) -> dict[str, Any]:
        return {
            "load": {"loop": self.load.of, **asdict(self.load)},
            "begin_s": self.begin,
            "end_s": self.end,
            "interrupted": self.interrupted,
            "records": [asdict(one) for one in self.records],
        }
