"""How long a client waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from diffuserve.errors import InvalidArgumentError

__all__ = ["Timeout"]


@dataclass(frozen=True, slots=True)
class Timeout:
    """Seconds, each finite and above 0.

    `connect`: until the server has answered that it is there; then ConnectionFailedError.
    `total`: from sending the request to its last picture; then DeadlineError, and the server is told to stop.
    The total includes the time to connect.

    Raises InvalidArgumentError.
    """

    total: float = 300.0
    connect: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise InvalidArgumentError(
                    f"the {field.name} timeout is {value} s, and must be above 0 and finite",
                    input=f"timeout.{field.name}",
                    value=str(value),
                )

    @classmethod
    def of(cls, value: Timeout | float) -> Timeout:
        """A number of seconds is the total."""
        return value if isinstance(value, Timeout) else cls(total=value)
