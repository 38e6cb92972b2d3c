"""Arrivals, and what is said of latencies: as `diffuserve bench` has them, and with no torch, for simulations too."""

from __future__ import annotations

from itertools import islice

from diffuserve_client._bench.figures import percentile
from diffuserve_client._bench.load import poisson_arrivals

__all__ = ["STEPS", "arrivals", "percentile"]

#: What mixed requests ask for.
STEPS = (4, 8, 20, 50)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which the first requests of a Poisson process with `rate` a second arrive."""
    return list(islice(poisson_arrivals(rate, seed), count))
