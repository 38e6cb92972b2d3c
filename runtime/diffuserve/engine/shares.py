"""How checkpoints share one device: weighted fair shares of measured seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

__all__ = ["BRIEF", "Shares"]

#: UNet calls of a request that is brief, as those of distilled checkpoints are; and of its checkpoint's calls, how many
#: it may be ahead of its share for one.
BRIEF: Final = 8


class Shares:
    """Virtual times of checkpoints: the seconds that each was stepped, divided by its weight.

    Start-time fair queueing (Goyal et al. 1996): whoever competes and has least goes next, and one that comes, or comes
    back, starts level with the one that has least, so that absence earns nothing. With borrowing (Duda & Cheriton 1999,
    "Borrowed-virtual-time scheduling"): a claim may count as so much less than it is. It goes first now and is charged
    as everybody, so shares over longer times stay what they are. What it borrowed is remembered while it is away.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._times: dict[str, float] = {}
        self._competing: set[str] = set()
        self._floor = 0.0

    def compete(self, names: Iterable[str]) -> None:
        """Who could be stepped now. Nobody: all are even again."""
        names = dict.fromkeys(names)
        if not names:
            self._times.clear()
            self._floor = 0.0
        else:
            stayed = [self._times[name] for name in names if name in self._competing]
            self._floor = max(self._floor, min(stayed, default=0.0))
            for name in names:
                self._times[name] = max(self._times.get(name, 0.0), self._floor)
            # Of the others, those that owe something are remembered: as many as there are checkpoints, at most.
            gone = [name for name, time in self._times.items() if name not in names and time <= self._floor]
            for name in gone:
                del self._times[name]
        self._competing = set(names)

    def next(self, borrowing: Mapping[str, float]) -> str:
        """Of those that compete, the one whose turn it is; of equals, the one that was charged longest ago.

        `borrowing` is the seconds by which each may be ahead.
        """
        return min(
            (name for name in self._times if name in self._competing),
            key=lambda name: self._times[name] - borrowing.get(name, 0.0) / self._weight(name),
        )

    def charge(self, name: str, seconds: float) -> None:
        """`name` was stepped for so long; below zero, where it was charged too much before."""
        # It is the last of the dictionary now.
        self._times[name] = self._times.pop(name, self._floor) + seconds / self._weight(name)

    def ahead(self, name: str) -> float:
        """How far the virtual time of `name` is above the least."""
        return max(0.0, self._times.get(name, self._floor) - self._floor)
