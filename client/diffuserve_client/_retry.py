"""How often a client tries again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from diffuserve.errors import InvalidArgumentError

__all__ = ["NO_RETRY", "Retry"]

_MOST_RETRIES: Final = 1000


@dataclass(frozen=True, slots=True)
class Retry:
    """What happens when a server is lost, shuts down, is not ready, or is full.

    A request is tried `retries` times more, on each of the client's servers. While no server is known to work, the
    pauses are `first` seconds, then twice that, up to `most`, and up to a quarter longer by chance. A full server says
    when it expects to have room: that is waited for, however often, within the total timeout. Requests make the same
    pictures each time, so trying again is safe; a failed engine is tried once more. 0 retries: every failure is raised
    at once.

    Raises InvalidArgumentError.
    """

    retries: int = 4
    first: float = 0.5
    most: float = 8.0

    def __post_init__(self) -> None:
        if not 0 <= self.retries <= _MOST_RETRIES:
            raise InvalidArgumentError(
                f"retries is {self.retries}, and must be from 0 to {_MOST_RETRIES}; 0 is off",
                input="retry.retries",
                value=self.retries,
            )
        if not 0 < self.first <= self.most < math.inf:
            raise InvalidArgumentError(
                f"the pauses between tries go from {self.first} s to {self.most} s, and must be above 0, finite, and "
                "the first no longer than the longest",
                input="retry.first",
                value=str(self.first),
            )

    def pause(self, failures: int) -> float:
        """Seconds for which a server is left alone after it failed that many times in a row."""
        return min(self.most, self.first * 2.0 ** min(failures - 1, 60))


NO_RETRY: Final = Retry(retries=0)
