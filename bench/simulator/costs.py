"""What everything costs on one machine: a table in JSON, with where its numbers are from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffuserve.engine import Group, StepCosts

__all__ = ["TABLES", "CostTable", "Line"]

#: Where the tables are.
TABLES = Path(__file__).resolve().parents[1] / "tables"


@dataclass(frozen=True)
class Line:
    """Seconds of something by how many are in it."""

    fixed: float
    each: float

    def __call__(self, count: int) -> float:
        return self.fixed + self.each * count

    def rounded(self) -> Line:
        """To microseconds."""
        return Line(round(self.fixed, 6), round(self.each, 6))

    def __mul__(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)


@dataclass(frozen=True)
class CostTable:
    """Seconds of one machine's engines when each runs alone, and of what is around them.

    unet          of a call by its rows; between them on straight lines, beyond them as the last two go on
    text_encoder  of a call by its texts
    vae_decoder   of a call, which decodes one picture
    between       two UNet calls by the rows of the first: the loop's own arithmetic
    before, join  from the client to admission; from the texts' encoding until the image can step
    file, reply   writing the picture's file; from there to the client
    sharing       what calls side by side get done together, in calls alone (see Device)
    max_rows      that the UNet's engine takes in one call
    size          of the pictures in pixels, [height, width]
    source        how the numbers came about, line by line
    """

    name: str
    source: tuple[str, ...]
    size: tuple[int, int]
    max_rows: int
    unet: Mapping[int, float]
    text_encoder: Line
    vae_decoder: float
    between: Line
    before: float
    join: float
    file: float
    reply: float
    sharing: float

    @classmethod
    def load(cls, name: str) -> CostTable:
        """The table of that name. Raises OSError where there is none, TypeError or ValueError where it is not whole."""
        raw: dict[str, Any] = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
        raw["unet"] = {int(rows): seconds for rows, seconds in raw["unet"].items()}
        for key in ("text_encoder", "between"):
            raw[key] = Line(**raw[key])
        height, width = raw["size"]
        return cls(**{**raw, "source": tuple(raw["source"]), "size": (height, width)})

    def save(self) -> Path:
        path = TABLES / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    def __post_init__(self) -> None:
        if len(self.unet) < 2 or list(self.unet) != sorted(self.unet):
            raise ValueError(
                f"{self.name}: unet has {list(self.unet)}, and must have two row counts or more, ascending"
            )

    @property
    def group(self) -> Group:
        return Group(self.name, *self.size)

    @cached_property
    def _points(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        return np.array(list(self.unet), dtype=np.float64), np.array(list(self.unet.values()))

    @cached_property
    def _known(self) -> dict[int, float]:
        return {}

    def unet_call(self, rows: int) -> float:
        """Seconds of a UNet call alone."""
        if rows not in self._known:
            counts, seconds = self._points
            if rows > counts[-1]:
                slope = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
                self._known[rows] = float(seconds[-1] + (rows - counts[-1]) * slope)
            else:
                self._known[rows] = float(np.interp(rows, counts, seconds))
        return self._known[rows]

    @property
    def row(self) -> float:
        """Seconds of a row in a full call, as routers count work."""
        return self.unet_call(self.max_rows) / self.max_rows

    def step_costs(self) -> StepCosts:
        """What a server knows after its trial calls."""
        costs = StepCosts()
        for rows in self.unet:
            if rows <= self.max_rows:
                costs.observe(self.group, rows, self.unet_call(rows) + self.between(rows))
        return costs

    def slower(self, factor: float) -> CostTable:
        """The same with engines that take `factor` times as long."""
        return replace(
            self,
            unet={rows: factor * seconds for rows, seconds in self.unet.items()},
            text_encoder=self.text_encoder * factor,
            vae_decoder=factor * self.vae_decoder,
        )
