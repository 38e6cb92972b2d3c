"""Markdown tables, and targets that a figure meets or does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NO_TARGET", "Target", "at_least", "at_most", "table"]


@dataclass(frozen=True)
class Target:
    """A limit that a figure must not fall below, or must not exceed."""

    limit: float
    is_floor: bool
    unit: str = ""

    def cells(self, value: float | None) -> tuple[str, str]:
        """The columns 'target' and 'met'."""
        sign = ">=" if self.is_floor else "<="
        text = f"{sign} {self.limit:g}{self.unit}"
        if value is None:
            return text, "not measured"
        return text, "yes" if (value >= self.limit if self.is_floor else value <= self.limit) else "no"


#: The two columns of a row that has no target.
NO_TARGET = ("", "")


def at_least(limit: float, unit: str = "") -> Target:
    return Target(limit, True, unit)


def at_most(limit: float, unit: str = "") -> Target:
    return Target(limit, False, unit)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
