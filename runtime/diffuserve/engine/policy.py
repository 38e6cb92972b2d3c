"""What to do next: decisions on counts and turns alone, with no tensor, thread or clock in sight."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffuserve.errors import QueueFullError

__all__ = ["Candidate", "Group", "StepPolicy"]


class Group(NamedTuple):
    """Images that may share a UNet call: one checkpoint, one size in pixels."""

    checkpoint: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image that could be stepped.

    Images of one `group` (checkpoint and size) may share a UNet call. `rows` is 2 with guidance and 1 without.
    `last_stepped` is the number of the call that stepped it last, or 0; `joined` orders arrivals.
    """

    key: int
    group: Hashable
    rows: int
    last_stepped: int
    joined: int


@dataclass(frozen=True, slots=True)
class StepPolicy:
    """Admission and the choice of each UNet call's rows.

    `max_requests` bounds the requests that are in the server at once, `max_rows` the rows of one UNet call.
    """

    max_rows: int
    max_requests: int = 256

    def admit(self, requests: int) -> None:
        """Raise QueueFullError where one more request, beside `requests` in the server, would be too many."""
        if requests >= self.max_requests:
            raise QueueFullError(
                f"{requests} requests are in the server, and at most {self.max_requests} are taken; try again later",
                waiting=requests,
                maximum=self.max_requests,
            )

    def choose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The images of the next UNet call: all of one group, at most `max_rows` rows.

        Least recently stepped first, then first come first, so groups take turns and nothing starves. What is
        chosen keeps the order in which it joined, so that a call's rows do not move about from step to step.
        """
        waiting = sorted(candidates, key=lambda one: (one.last_stepped, one.joined))
        if not waiting:
            return []
        group, rows, chosen = waiting[0].group, 0, list[Candidate]()
        for one in waiting:
            if one.group == group and rows + one.rows <= self.max_rows:
                chosen.append(one)
                rows += one.rows
        return sorted(chosen, key=lambda one: one.joined)
