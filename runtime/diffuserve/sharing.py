"""How the checkpoints of one server share it: what its command line says, as variables of its environment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from diffuserve.manifest import Deployment
from diffuserve.residency import Limits

__all__ = ["SharingOptions", "models_of", "weight_from"]

_PREFIX: Final = "DIFFUSERVE_"
_LEAST, _MOST = 0.001, 1000.0


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """`limits` of memory and time, `weights` by checkpoint where they are not 1, and the names of `pinned` ones.

    Raises ValueError for a weight or a limit that is out of range.
    """

    limits: Limits = field(default_factory=Limits)
    weights: Mapping[str, float] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not _LEAST <= weight <= _MOST:
                raise ValueError(f"the weight of {name} is {weight:g}, and must be from {_LEAST:g} to {_MOST:g}")
        if self.limits.budget is not None and self.limits.budget <= 0:
            raise ValueError(f"the memory budget is {self.limits.budget / 1e9:g} GB, and must be above 0")
        for name in ("idle", "stay"):
            if not 0 <= getattr(self.limits, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self.limits, name):g} s, and must be a number of seconds from 0")
        if self.limits.loads < 1:
            raise ValueError(f"{self.limits.loads} loads a minute are allowed, and there must be 1 at least")

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads."""
        limits = self.limits
        values = {
            "MEMORY_BUDGET_GB": "" if limits.budget is None else repr(limits.budget / 1e9),
            "IDLE_RELEASE_S": repr(limits.idle),
            "LEAST_STAY_S": repr(limits.stay),
            "LOADS_A_MINUTE": str(limits.loads),
            "WEIGHTS": ",".join(f"{name}={weight!r}" for name, weight in self.weights.items()),
            "PINNED": ",".join(self.pinned),
        }
        return {f"{_PREFIX}{name}": value for name, value in values.items()}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SharingOptions:
        """Raises ValueError, naming the variable."""

        def number(name: str, default: float) -> float:
            text = environment.get(f"{_PREFIX}{name}", "")
            try:
                value = float(text) if text else default
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(f"{_PREFIX}{name} is {text!r}, and must be a number")
            return value

        usual = Limits()
        budget = number("MEMORY_BUDGET_GB", 0.0) if environment.get(f"{_PREFIX}MEMORY_BUDGET_GB") else None
        limits = Limits(
            budget=None if budget is None else round(budget * 1e9),
            idle=number("IDLE_RELEASE_S", usual.idle),
            stay=number("LEAST_STAY_S", usual.stay),
            loads=int(number("LOADS_A_MINUTE", usual.loads)),
        )
        weights = environment.get(f"{_PREFIX}WEIGHTS", "")
        return cls(
            limits, dict(map(weight_from, _parts(weights))), tuple(_parts(environment.get(f"{_PREFIX}PINNED", "")))
        )


def weight_from(text: str) -> tuple[str, float]:
    """A checkpoint's weight, as NAME=NUMBER. Raises ValueError."""
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise ValueError(f"{text!r} is no weight; it must be NAME=NUMBER") from None


def models_of(deployment: Deployment) -> dict[str, dict[str, int]]:
    """The bytes of each checkpoint's Triton models, by its name. Raises OSError or ValueError as a manifest does."""
    manifests = {name: deployment.manifest(name) for name in deployment.checkpoints}
    return {
        name: {one.model: manifest.device_bytes(component) for component, one in manifest.components.items()}
        for name, manifest in manifests.items()
    }


def _parts(text: str) -> Iterator[str]:
    return filter(None, (one.strip() for one in text.split(",")))
