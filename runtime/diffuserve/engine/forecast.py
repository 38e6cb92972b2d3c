"""When images will be done: the policy's order played forward on counts, without stepping through every call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from diffuserve.engine.costs import Group

__all__ = ["Demand", "Forecast", "forecast"]

#: A group's row cap, and the seconds of a call by its rows and the chunks of its prompts.
Calls = Callable[[Group], tuple[int, Callable[[int, int], float]]]


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What one image still takes: `remaining` UNet calls of `rows` rows, with prompts of `chunks` windows, and with its
    LoRAs, which `adapter` tells from others; it is empty where there are none.
    """

    group: Group
    rows: int
    remaining: int
    priority: int = 0
    chunks: int = 1
    adapter: tuple[Hashable, ...] = ()


class Forecast(NamedTuple):
    """Seconds from now until the first and the last of some images have had their last UNet call."""

    earliest: float
    latest: float


def forecast(
    present: Sequence[Demand],
    calls: Calls,
    asked: Sequence[Demand],
    most_adapters: Callable[[Group], int] = lambda group: sys.maxsize,  # noqa: ARG005
) -> Forecast:
    """When `asked`, which are among `present`, will be stepped to their end.

    Nobody else is taken to arrive. Groups take turns, a call each; a call's rows are the images of the highest
    priority and the least left to do, up to the group's cap and as many adapters as its calls take. From one image's
    end to the next nothing changes, so time advances from end to end: at most as many rounds of work as there are
    images.
    """
    waiting: dict[Group, list[Demand]] = {}
    # The next one is the last of its list; of equals it is the first that came.
    numbered = enumerate(present)
    for _, one in sorted(numbered, key=lambda pair: (pair[1].priority, -pair[1].remaining, -pair[0])):
        waiting.setdefault(one.group, []).append(one)
    shapes = {group: calls(group) for group in waiting}
    running: dict[Group, dict[int, tuple[Demand, int]]] = {group: {} for group in waiting}
    done: list[float] = []
    missing = {id(one) for one in asked}
    clock, turns = 0.0, 0  # turns: calls that each group has had so far
    while missing:
        turn_cost, next_end = 0.0, None
        for group, (cap, seconds) in shapes.items():
            active, queue = running[group], waiting[group]
            rows = sum(one.rows for one, _ in active.values())
            adapters = {one.adapter for one, _ in active.values() if one.adapter}
            more = most_adapters(group) - len(adapters)
            while rows < cap and (fits := _next_that_fits(queue, cap - rows, adapters, more)) is not None:
                one = queue.pop(fits)
                active[id(one)] = one, turns + one.remaining
                rows += one.rows
                if one.adapter and one.adapter not in adapters:
                    adapters.add(one.adapter)
                    more -= 1
            if active:
                turn_cost += seconds(rows, math.lcm(*(one.chunks for one, _ in active.values())))
                end = min(last for _, last in active.values())
                next_end = end if next_end is None else min(next_end, end)
        if next_end is None:
            raise ValueError("a forecast was asked for images that are not present")
        clock += (next_end - turns) * turn_cost
        turns = next_end
        for active in running.values():
            for key in [key for key, (_, last) in active.items() if last <= turns]:
                del active[key]
                if key in missing:
                    missing.remove(key)
                    done.append(clock)
    return Forecast(done[0], done[-1]) if done else Forecast(0.0, 0.0)


def _next_that_fits(queue: Sequence[Demand], free: int, adapters: Set[Hashable], more: int) -> int | None:
    """The place of the next image with `free` rows at most, and with one of `adapters` unless `more` may be added."""

    def fits(one: Demand) -> bool:
        return one.rows <= free and (more > 0 or not one.adapter or one.adapter in adapters)

    return next((place for place in range(len(queue) - 1, -1, -1) if fits(queue[place])), None)
