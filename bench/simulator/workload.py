"""Requests and when they come: seeded, and the same for every system."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from measure.poisson import STEPS, arrivals

__all__ = ["MIXED", "UNIFORM", "Mix", "SimRequest", "poisson"]


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One picture: `steps` UNet evaluations of two rows with guidance, of one without. `texts` name its prompts."""

    key: int
    steps: int
    guided: bool
    texts: tuple[str, ...]
    arrives: float = 0.0

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked for: steps drawn evenly from a few, and how many of the requests are guided.

    Every request has a prompt of its own; guided ones share the empty negative prompt.
    """

    steps: tuple[int, ...]
    guided: float

    def requests(self, times: Sequence[float], seed: int) -> list[SimRequest]:
        """One request for each time of arrival; every kind has its share of them, in random order."""
        rng, count = random.Random(seed), len(times)
        steps = [self.steps[key % len(self.steps)] for key in range(count)]
        guided = [key < round(self.guided * count) for key in range(count)]
        rng.shuffle(steps)
        rng.shuffle(guided)
        return [
            SimRequest(key, steps[key], guided[key], (f"prompt {key}", "")[: 1 + guided[key]], arrives)
            for key, arrives in enumerate(times)
        ]

    @property
    def row_steps(self) -> float:
        """Rows that a request takes through the UNet, on average."""
        return sum(self.steps) / len(self.steps) * (1 + self.guided)


MIXED = Mix(STEPS, 0.5)
UNIFORM = Mix((20,), 1.0)


def poisson(mix: Mix, count: int, rate: float, seed: int) -> list[SimRequest]:
    """Requests of a Poisson process in which `count` happen to come in count / rate seconds."""
    times = arrivals(count, rate, seed)
    return mix.requests([time * count / rate / times[-1] for time in times], seed)
