"""The shapes that an engine takes, and the facts by which a foreign or damaged engine is told from the right one.

TensorRT builds an engine for profiles, and a profile is a box: a range for each side that varies. A bound on
rows x pixels is no box, so it is covered by a staircase of them: many rows of small pictures, few rows of large ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffuserve.errors import InvalidArgumentError

__all__ = ["ROWS", "EngineFacts", "Profile", "Range"]

ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Range:
    """min, opt and max of an engine profile's dimension, and the step that values must keep to."""

    min: int
    opt: int
    max: int
    step: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.min <= self.opt <= self.max and self.step > 0):
            raise InvalidArgumentError(f"{self} is no range: it needs 0 < min <= opt <= max and a step above 0")
        if self.min % self.step or self.opt % self.step or self.max % self.step:
            raise InvalidArgumentError(f"{self}: min, opt and max must be multiples of {self.step}")

    def check(self, name: str, value: int) -> None:
        """Raise InvalidArgumentError where `value` is outside the range or between its steps."""
        if value not in self:
            raise InvalidArgumentError(
                f"{name} is {value}, and must be a multiple of {self.step} from {self.min} to {self.max}",
                input=name,
                value=value,
                minimum=self.min,
                maximum=self.max,
                step=self.step,
            )

    def fit(self, value: int) -> int:
        """The largest value of the range that is not above `value`, or its smallest."""
        return min(self.max, max(self.min, value // self.step * self.step))

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.step == 0


@dataclass(frozen=True, slots=True)
class Profile:
    """One box: a range for each side that varies, by its name, such as `rows` and `latent_height`.

    `activation_bytes` is the device memory of a context in this profile, as the engine or its builder reports it.
    """

    sides: Mapping[str, Range]
    activation_bytes: int = 0

    def takes(self, sides: Mapping[str, int]) -> bool:
        """Whether a call with these sides fits. Sides that the profile has not are of no matter to it."""
        return all(value in self.sides[name] for name, value in sides.items() if name in self.sides)

    @property
    def is_static(self) -> bool:
        """Whether it takes one shape only, for which a CUDA graph can be captured."""
        return all(side.min == side.max for side in self.sides.values())

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Profile:
        sides = {name: Range(**side) for name, side in raw["sides"].items()}
        return cls(sides, int(raw["activation_bytes"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is known of one built engine.

    `builder` and `version` are tensorrt or tensorrt-rtx and its version. `devices` are the compute capabilities, like
    "8.9", that it runs on. `onnx_sha256` is of the graph and its weights that it was built from; `sha256` and
    `bytes` are of the engine. `build_seconds` and `build_peak_bytes` say what building it took.
    """

    builder: str
    version: str
    precision: str
    devices: tuple[str, ...]
    profiles: tuple[Profile, ...]
    onnx_sha256: str
    sha256: str
    bytes: int
    build_seconds: float = 0.0
    build_peak_bytes: int = 0

    def max_rows(self, sides: Mapping[str, int]) -> int:
        """The most rows of a call with these other sides; 0 where no profile takes them."""
        others = {name: value for name, value in sides.items() if name != ROWS}
        return max((one.sides[ROWS].max for one in self.profiles if one.takes(others)), default=0)

    def row_buckets(self, sides: Mapping[str, int]) -> tuple[int, ...]:
        """The row counts that have a CUDA graph with these other sides, ascending."""
        others = {name: value for name, value in sides.items() if name != ROWS}
        return tuple(sorted({one.sides[ROWS].max for one in self.profiles if one.is_static and one.takes(others)}))

    @property
    def device_bytes(self) -> int:
        """Device memory while it is served: its weights, and its contexts.

        Triton's TensorRT backend holds a context for each profile. The TensorRT-RTX component holds one block of
        memory, as large as the largest profile needs, and one device's share of the weights.
        """
        needed = [one.activation_bytes for one in self.profiles]
        if self.builder == "tensorrt-rtx":
            return self.bytes // len(self.devices) + max(needed)
        return self.bytes + sum(needed)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EngineFacts:
        """Raises KeyError, TypeError or ValueError where `raw` is not what `dataclasses.asdict` made of one."""
        profiles = tuple(Profile.from_dict(one) for one in raw["profiles"])
        return cls(**{**raw, "profiles": profiles, "devices": tuple(raw["devices"])})
