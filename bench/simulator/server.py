"""What all simulated servers have in common: how requests come in, who is told when they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from simulator.workload import SimRequest

__all__ = ["Calls", "SimServer", "Texts"]


@dataclass(slots=True)
class Calls:
    """UNet calls so far: how many, their rows, and how many of those were of images that still needed the step."""

    calls: int = 0
    rows: int = 0
    useful: int = 0

    def count(self, rows: int, useful: int) -> None:
        self.calls += 1
        self.rows += rows
        self.useful += useful

    def __iadd__(self, other: Calls) -> Calls:
        self.calls += other.calls
        self.rows += other.rows
        self.useful += other.useful
        return self


@dataclass(slots=True)
class Texts:
    """Texts whose encoding a server still has."""

    known: set[str] = field(default_factory=set)

    def new(self, texts: Iterable[str]) -> int:
        """How many of these must be encoded now; from then on they are known."""
        wanted = set(texts) - self.known
        self.known |= wanted
        return len(wanted)


class SimServer(Protocol):
    """Takes requests as they come; tells `on_end` of each one's end, once."""

    on_end: Callable[[SimRequest, bool], None]
    """Called with a request and whether it was served; it was refused otherwise."""

    @property
    def work(self) -> float:
        """Seconds of engine time that its requests still need, as a router would estimate it."""
        ...

    @property
    def counted(self) -> Calls: ...

    def submit(self, request: SimRequest) -> None: ...
