"""What the engine tells of itself while it runs: the port between the service and whoever keeps metrics."""

from __future__ import annotations

from diffuserve.engine.policy import Group

__all__ = ["Telemetry"]


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

    def load(self, waiting: int, active: int) -> None:
        """How many requests wait for their first step, and how many are being stepped."""
