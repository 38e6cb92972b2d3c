"""How long a client waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import MIN_HEARTBEAT_MS

__all__ = ["Timeout"]

_BEATS_WITHIN_STALL: Final = 3  # two may be late or lost


@dataclass(frozen=True, slots=True)
class Timeout:
    """Seconds, each finite and above 0.

    `connect`: until the server has answered that it is there; then ConnectionFailedError.
    `stall`: in which nothing came, 2 at least; then ConnectionFailedError. The client asks the server for signs of
    life (`heartbeat_ms`) three times as often, so a request that waits or has long steps is not taken for a dead one.
    The first answer may take longer by a second for every 50 kB of the request, which must get there first.
    `total`: from sending the request to its last picture; then DeadlineError, and the server is told to stop.
    The total includes the time to connect.

    Raises InvalidArgumentError.
    """

    total: float = 300.0
    connect: float = 5.0
    stall: float = 15.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise InvalidArgumentError(
                    f"the {field.name} timeout is {value} s, and must be above 0 and finite",
                    input=f"timeout.{field.name}",
                    value=str(value),
                )
        if self.stall < (least := 2 * MIN_HEARTBEAT_MS / 1000):
            raise InvalidArgumentError(
                f"the stall timeout is {self.stall} s, and must be {least:g} at least: a server sends signs of life "
                f"every {MIN_HEARTBEAT_MS} ms at most",
                input="timeout.stall",
                value=self.stall,
                minimum=least,
            )

    @property
    def heartbeat_ms(self) -> int:
        """After how many milliseconds of silence the server is to send a sign of life."""
        return max(MIN_HEARTBEAT_MS, round(1000 * self.stall / _BEATS_WITHIN_STALL))

    @classmethod
    def of(cls, value: Timeout | float) -> Timeout:
        """A number of seconds is the total."""
        return value if isinstance(value, Timeout) else cls(total=value)
