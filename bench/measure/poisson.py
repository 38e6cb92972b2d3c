"""Arrivals, and what is said of latencies. No torch is imported here: simulations need these as well."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

__all__ = ["STEPS", "arrivals", "percentile"]

#: What mixed requests ask for.
STEPS = (4, 8, 20, 50)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which the requests of a Poisson process with `rate` a second arrive."""
    rng = random.Random(seed)
    times, now = list[float](), 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share))
