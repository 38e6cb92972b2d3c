"""What the engine tells of itself while it runs: the port between the service and whoever keeps metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine imports this module
    from diffuserve.engine import Group

__all__ = ["Fanout", "Telemetry"]


class Telemetry:
    """Listens, and by itself does nothing. Called from the service's threads; must return at once and never raise.

    Times are seconds. `outcome` is "done", or the code of the error that ended the request.
    """

    def refused(self, code: str) -> None:
        """A request was not accepted."""

    def accepted(self, request_id: str, checkpoint: str, eta: float) -> None:
        """A request was accepted, and its last picture is expected `eta` seconds from now."""

    def joined(self, checkpoint: str, wait: float) -> None:
        """An image's first UNet call began, `wait` after its latents and text were ready."""

    def stepped(self, group: Group, rows: int, seconds: float, engine: float) -> None:
        """A UNet call is over: `rows` went in (padding included), `engine` of its `seconds` were the engine's."""

    def ended(self, request_id: str, checkpoint: str, outcome: str, eta: float, seconds: float) -> None:
        """An accepted request got its final response, `seconds` after it came; `eta` is what it had been told."""

    def deployed(self, checkpoint: str) -> None:
        """A checkpoint is served, or no longer, that was not from the start."""

    def load(self, waiting: int, active: int) -> None:
        """How many requests wait for their first step, and how many are being stepped."""

    def lora(self, hit: bool, held_bytes: int) -> None:
        """A file of LoRA was asked for, and was held in memory or was read; `held_bytes` are held now."""

    def loaded(self, checkpoint: str, seconds: float) -> None:
        """A checkpoint's components were loaded, in so many seconds."""

    def unloaded(self, checkpoint: str) -> None:
        """A checkpoint's components left."""

    def load_failed(self, checkpoint: str) -> None:
        """A checkpoint's components could not be loaded."""

    def resident(self, checkpoints: Mapping[str, int], total: int) -> None:
        """The bytes of each checkpoint's components that are in memory, and of all: shared ones are counted once."""


class Fanout(Telemetry):
    """Passes every call on to several listeners, in turn."""

    def __init__(self, *listeners: Telemetry) -> None:
        self._listeners = listeners

    def refused(self, code: str) -> None:
        for one in self._listeners:
            one.refused(code)

    def accepted(self, request_id: str, checkpoint: str, eta: float) -> None:
        for one in self._listeners:
            one.accepted(request_id, checkpoint, eta)

    def joined(self, checkpoint: str, wait: float) -> None:
        for one in self._listeners:
            one.joined(checkpoint, wait)

    def stepped(self, group: Group, rows: int, seconds: float, engine: float) -> None:
        for one in self._listeners:
            one.stepped(group, rows, seconds, engine)

    def ended(self, request_id: str, checkpoint: str, outcome: str, eta: float, seconds: float) -> None:
        for one in self._listeners:
            one.ended(request_id, checkpoint, outcome, eta, seconds)

    def deployed(self, checkpoint: str) -> None:
        for one in self._listeners:
            one.deployed(checkpoint)

    def load(self, waiting: int, active: int) -> None:
        for one in self._listeners:
            one.load(waiting, active)

    def lora(self, hit: bool, held_bytes: int) -> None:
        for one in self._listeners:
            one.lora(hit, held_bytes)

    def loaded(self, checkpoint: str, seconds: float) -> None:
        for one in self._listeners:
            one.loaded(checkpoint, seconds)

    def unloaded(self, checkpoint: str) -> None:
        for one in self._listeners:
            one.unloaded(checkpoint)

    def load_failed(self, checkpoint: str) -> None:
        for one in self._listeners:
            one.load_failed(checkpoint)

    def resident(self, checkpoints: Mapping[str, int], total: int) -> None:
        for one in self._listeners:
            one.resident(checkpoints, total)
