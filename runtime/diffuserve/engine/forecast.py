"""When images will be done: the policy's order played forward on counts, without stepping through every call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Final, NamedTuple

from diffuserve.engine.costs import Group
from diffuserve.engine.shares import BRIEF

__all__ = ["Demand", "Forecast", "Sharing", "forecast"]

#: A group's row cap, and the seconds of a call by its rows and the chunks of its prompts.
Calls = Callable[[Group], tuple[int, Callable[[int, int], float]]]

_SAME: Final = 1e-9  # of seconds and of turns: what arithmetic makes of equal ones


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What one image still takes: `remaining` UNet calls of `rows` rows, with prompts of `chunks` windows, and with its
    LoRAs, which `adapter` tells from others; it is empty where there are none.

    `length` counts all of its calls, those that it had included; 0 is as many as remain.
    """

    group: Group
    rows: int
    remaining: int
    priority: int = 0
    chunks: int = 1
    length: int = 0
    adapter: tuple[Hashable, ...] = ()

    @property
    def is_brief(self) -> bool:
        return (self.length or self.remaining) <= BRIEF


class Forecast(NamedTuple):
    """Seconds from now until the first and the last of some images have had their last UNet call."""

    earliest: float
    latest: float


class Sharing(NamedTuple):
    """What a forecast knows of checkpoints, by name: the weight, how far its virtual time is ahead of the least, and
    the seconds until its components are there.
    """

    weight: Callable[[str], float] = lambda _: 1.0
    ahead: Callable[[str], float] = lambda _: 0.0
    ready: Callable[[str], float] = lambda _: 0.0


class _Group:
    """Images of one group: those that wait, the next one last, and those in its calls with the turn of their last."""

    def __init__(self, cap: int, seconds: Callable[[int, int], float], most_adapters: int) -> None:
        self.cap, self.seconds, self.most_adapters = cap, seconds, most_adapters
        self.queue: list[Demand] = []
        self.active: list[tuple[Demand, float]] = []

    def fill(self, turns: float) -> float:
        """Let images into the calls; the seconds of a call from now on."""
        rows = sum(one.rows for one, _ in self.active)
        adapters = {one.adapter for one, _ in self.active if one.adapter}
        while rows < self.cap:
            more = self.most_adapters - len(adapters)
            fits = _next_that_fits(self.queue, self.cap - rows, adapters, more)
            if fits is None:
                break
            one = self.queue.pop(fits)
            self.active.append((one, turns + one.remaining))
            rows += one.rows
            if one.adapter:
                adapters.add(one.adapter)
        return self.seconds(rows, math.lcm(*(one.chunks for one, _ in self.active))) if self.active else 0.0

    def brief_call(self, priority: int | None) -> float:
        """The seconds of a call of its brief images of that priority alone, as StepPolicy counts them."""
        every = (*(one for one, _ in self.active), *self.queue)
        rows = sum(one.rows for one in every if one.is_brief and one.priority == priority)
        return self.seconds(min(rows, self.cap), 1) if rows else 0.0


class _Checkpoint:
    """One checkpoint's groups, which take turns, a call each. `virtual` is its time as fair sharing counts it."""

    def __init__(self, weight: float, virtual: float, ready: float) -> None:
        self.weight, self.virtual, self.ready = weight, virtual, ready
        self.groups: dict[Group, _Group] = {}
        self.turns = 0.0
        self.cost = 0.0  # of a turn
        self._claims_less: float | None = None
        self.priority: int | None = None
        self.next_end = 0.0

    def fill(self) -> None:
        """Find out what a turn is from now on, and when one of its images ends."""
        self.cost = sum(one.fill(self.turns) for one in self.groups.values())
        active = [pair for held in self.groups.values() for pair in held.active]
        waiting = [one for held in self.groups.values() for one in held.queue]
        self.priority = max((one.priority for one in (*(one for one, _ in active), *waiting)), default=None)
        self.next_end = min((last for _, last in active), default=0.0)
        self._claims_less = None

    @property
    def claim(self) -> float:
        """What its virtual time counts as: less, by some calls of its brief images. Asked where several compete."""
        if self._claims_less is None:
            longest = max((held.brief_call(self.priority) for held in self.groups.values()), default=0.0)
            self._claims_less = BRIEF * longest / self.weight
        return self.virtual - self._claims_less

    @property
    def to_next_end(self) -> float:
        """Virtual time until one of its images ends."""
        return (self.next_end - self.turns) * self.cost / self.weight

    def advance(self, virtual: float) -> list[Demand]:
        """Let virtual time pass; the images that ended."""
        reached = virtual >= self.to_next_end - _SAME
        self.turns = self.next_end if reached else self.turns + virtual * self.weight / self.cost
        self.virtual += virtual
        if not reached:
            return []
        ended: list[Demand] = []
        for group in self.groups.values():
            ended += [one for one, last in group.active if last <= self.turns + _SAME]
            group.active = [(one, last) for one, last in group.active if last > self.turns + _SAME]
        self.fill()
        return ended


def forecast(
    present: Sequence[Demand],
    calls: Calls,
    asked: Sequence[Demand],
    sharing: Sharing | None = None,
    most_adapters: Callable[[Group], int] = lambda _: sys.maxsize,
) -> Forecast:
    """When `asked`, which are among `present`, will be stepped to their end.

    Nobody else is taken to arrive, and nobody to age. Of checkpoints, those that have the highest priority run by fair
    shares, as if they ran at once, each with its share of the time; brief images go first for as long as their
    checkpoint may borrow. In a checkpoint groups take turns, a call each; a call's rows are the images of the highest
    priority and the least left to do, up to the group's cap and as many adapters as its calls take. From one image's
    end to the next little changes, so time advances from end to end: a few rounds of work for each image.
    """
    checkpoints = _arranged(present, calls, sharing or Sharing(), most_adapters)
    done: list[float] = []
    missing = {id(one) for one in asked}
    clock = 0.0
    while missing:
        left = [one for one in checkpoints if one.priority is not None]
        if not left:
            raise ValueError("a forecast was asked for images that are not present")
        clock, ended = _round(left, clock)
        for one in ended:
            if id(one) in missing:
                missing.remove(id(one))
                done.append(clock)
    return Forecast(done[0], done[-1]) if done else Forecast(0.0, 0.0)


def _arranged(
    present: Sequence[Demand], calls: Calls, sharing: Sharing, most_adapters: Callable[[Group], int]
) -> list[_Checkpoint]:
    checkpoints: dict[str, _Checkpoint] = {}
    # The next one is the last of its list; of equals it is the first that came.
    numbered = enumerate(present)
    for _, one in sorted(numbered, key=lambda pair: (pair[1].priority, -pair[1].remaining, -pair[0])):
        name = one.group.checkpoint
        if name not in checkpoints:
            checkpoints[name] = _Checkpoint(sharing.weight(name), sharing.ahead(name), sharing.ready(name))
        groups = checkpoints[name].groups
        if one.group not in groups:
            groups[one.group] = _Group(*calls(one.group), most_adapters(one.group))
        groups[one.group].queue.append(one)
    for checkpoint in checkpoints.values():
        checkpoint.fill()
    return list(checkpoints.values())


def _round(left: Sequence[_Checkpoint], clock: float) -> tuple[float, list[Demand]]:
    """Until an image ends, or another checkpoint takes part: the time then, and what ended."""
    there = [one for one in left if one.ready <= clock]
    if not there:
        return min(one.ready for one in left), []
    top = max(one.priority for one in there if one.priority is not None)
    competing = [one for one in there if one.priority == top]
    claims = [one.claim for one in competing] if len(competing) > 1 else [0.0]
    lowest = min(claims)
    running = [one for one, claim in zip(competing, claims, strict=True) if claim <= lowest + _SAME]
    weights = sum(one.weight for one in running)
    until = [one.to_next_end for one in running]
    until += [claim - lowest for claim in claims if claim > lowest + _SAME]
    until += [(one.ready - clock) / weights for one in left if one.ready > clock]
    passing = max(0.0, min(until))
    ended = [demand for one in running for demand in one.advance(passing)]
    clock += passing * weights
    top = max((one.priority for one in there if one.priority is not None), default=top)
    # As of Shares: of those that stay in the competition; one that ended has had little, and nobody is level with it.
    stayed = [one.virtual for one in competing if one.priority == top]
    floor = min(stayed or [one.virtual for one in competing])
    for one in left:  # absence earns nothing
        if one not in competing:
            one.virtual = max(one.virtual, floor)
    return clock, ended


def _next_that_fits(queue: Sequence[Demand], free: int, adapters: Set[Hashable], more: int) -> int | None:
    """The place of the next image with `free` rows at most, and with one of `adapters` unless `more` may be added."""

    def fits(one: Demand) -> bool:
        return one.rows <= free and (more > 0 or not one.adapter or one.adapter in adapters)

    return next((place for place in range(len(queue) - 1, -1, -1) if fits(queue[place])), None)
