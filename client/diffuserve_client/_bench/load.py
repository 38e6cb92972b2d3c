"""How much is asked of a server, and when."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from diffuserve.errors import InvalidArgumentError

__all__ = ["ClosedLoop", "Extent", "Load", "OpenLoop", "poisson_arrivals"]

_MOST_CONCURRENT: Final = 4096
_MOST_RATE: Final = 10_000.0


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which the requests of a Poisson process with `rate` a second arrive, without end."""
    rng, now = random.Random(seed), 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many callers, each of whom sends the next request when its last one is answered.

    Raises InvalidArgumentError.
    """

    concurrency: int

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= _MOST_CONCURRENT:
            raise InvalidArgumentError(
                f"the concurrency is {self.concurrency}, and must be from 1 to {_MOST_CONCURRENT}",
                input="concurrency",
                value=self.concurrency,
                maximum=_MOST_CONCURRENT,
            )

    of: ClassVar[str] = "closed loop"

    @property
    def short(self) -> str:
        return f"{self.concurrency} at once"

    def __str__(self) -> str:
        return f"{self.of}, {self.short}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals, `rate` a second on average, whatever is still under way. Raises InvalidArgumentError."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= _MOST_RATE:
            raise InvalidArgumentError(
                f"the rate is {self.rate} requests a second, and must be above 0, to {_MOST_RATE:g}",
                input="rate",
                value=str(self.rate),
                maximum=_MOST_RATE,
            )

    of: ClassVar[str] = "open loop"

    @property
    def short(self) -> str:
        return f"{self.rate:g}/s"

    def __str__(self) -> str:
        return f"{self.of}, {self.rate:g} requests/s"


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a load is kept up: for so many requests, or seconds; `warm_up` requests come before, and do not count.

    Raises InvalidArgumentError.
    """

    requests: int | None = None
    seconds: float | None = None
    warm_up: int = 0

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.seconds is None):
            raise InvalidArgumentError(
                "how long to measure must be said once: give --requests, or --duration in seconds", input="requests"
            )
        if self.requests is not None and self.requests < 1:
            raise InvalidArgumentError(
                f"the requests to measure are {self.requests}, and must be 1 at least",
                input="requests",
                value=self.requests,
            )
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InvalidArgumentError(
                f"the duration is {self.seconds} s, and must be above 0 and finite",
                input="duration",
                value=str(self.seconds),
            )
        if self.warm_up < 0:
            raise InvalidArgumentError(
                f"the requests to warm up with are {self.warm_up}, and must be 0 at least",
                input="warm_up",
                value=self.warm_up,
            )
