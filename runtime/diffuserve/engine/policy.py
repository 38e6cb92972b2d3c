"""What to do next: decisions on counts, shapes, costs and clocks alone, with no tensor and no thread in sight.

The same class decides in the server, in tests with a fake clock, and in simulations. Times are seconds of one
monotonic clock, which callers read and pass in as `now`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from diffuserve.engine.costs import Group, StepCosts
from diffuserve.engine.forecast import Demand, Sharing, forecast
from diffuserve.engine.shares import BRIEF, Shares
from diffuserve.errors import DeadlineError, QueueFullError

__all__ = ["Candidate", "Eta", "Step", "StepPolicy"]

MAX_IMAGES: Final = 256
_SHORT: Final = 4
_BRISK_CALLS: Final = 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image that could be stepped.

    `rows` is 2 with guidance and 1 without. `length` counts its UNet evaluations in all, `remaining` those still
    to come. `waiting_since` is when it joined or was last stepped; `joined` orders arrivals. `deadline` is a time, or
    None. `adapter` tells its LoRAs from others; it is empty where there are none.
    """

    key: int
    group: Group
    rows: int
    length: int
    remaining: int
    joined: int
    waiting_since: float
    priority: int = 0
    tag: str = ""
    deadline: float | None = None
    adapter: tuple[Hashable, ...] = ()


@dataclass(frozen=True, slots=True)
class Eta:
    """When a request is expected to be done, in `seconds`; `raw` is the forecast before experience corrected it.

    `images` are in the server then, its own among them.
    """

    seconds: float
    raw: float
    images: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One UNet call: whose rows go in, in the order in which they joined, and how many rows it has with padding.

    `expected` is the seconds that it should take.
    """

    chosen: tuple[Candidate, ...]
    rows: int
    expected: float = 0.0

    @property
    def group(self) -> Group:
        return self.chosen[0].group


class _Adapters:
    """The adapters of one call, `most` at most."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, set[Hashable]()

    def take(self, adapter: tuple[Hashable, ...]) -> bool:
        """Whether the call has that adapter now."""
        if adapter and adapter not in self._taken:
            if len(self._taken) == self._most:
                return False
            self._taken.add(adapter)
        return True


def kind_of(demands: Sequence[Demand]) -> Hashable:
    """Requests that take alike outside of stepping: the same size and as many images."""
    return demands[0].group, len(demands)


def most_calls(demands: Sequence[Demand]) -> int:
    """UNet calls until the last image is done."""
    return max(one.remaining for one in demands)


@dataclass(slots=True, kw_only=True)
class StepPolicy:
    """Admission, and the choice of each UNet call's rows. The only place that decides; not thread safe.

    max_rows      the rows that a group's engine profile takes in one call, 2 at least
    max_adapters  the adapters that a group's engine takes in one call, beside none at all; 1 at least
    max_images    the images that may be in the server at once, until they are pictures
    row_buckets   the row counts of a group's engine that wants fixed shapes, ascending; empty for any count
    target_step   seconds that a call should not exceed, where a smaller one is possible; None is no target
    efficiency    of the best rows a second that is enough: more rows a call would only make each step slower. None
                  fills every call to max_rows
    brisk         the same while short requests keep coming, as the next one waits for the call that is under way
    stretch       how many times longer a call may take than one of the short requests in it alone, where they are few
                  beside long ones
    ageing        seconds without a step after which an image counts as one priority higher
    weight        of a checkpoint, above 0: its share of the stepping time beside others is in proportion to it
    """

    costs: StepCosts
    max_rows: Callable[[Group], int]
    max_adapters: Callable[[Group], int] = lambda _: MAX_IMAGES
    max_images: int = MAX_IMAGES
    row_buckets: Callable[[Group], tuple[int, ...]] = lambda _: ()
    target_step: float | None = None
    efficiency: float | None = 0.95
    brisk: float | None = 0.85
    stretch: float = 3.0
    ageing: float = 5.0
    weight: Callable[[str], float] = lambda _: 1.0
    # Work that each client tag has had, as fair queueing's virtual time (Goyal et al. 1996, start-time fair queueing):
    # kept for tags with images in the server only, so its size is bounded.
    _served: dict[str, float] = field(default_factory=dict, init=False)
    _shares: Shares = field(init=False)
    _called: dict[Group, int] = field(default_factory=dict, init=False)
    _calls: int = field(default=0, init=False)
    _calls_since_short: int = field(default=_BRISK_CALLS, init=False)

    def __post_init__(self) -> None:
        self._shares = Shares(self.weight)

    def admit(
        self,
        demands: Sequence[Demand],
        present: Sequence[Demand],
        now: float,
        deadline: float | None = None,
        ready: Callable[[str], float] = lambda _: 0.0,
        stepped: int = 0,
    ) -> Eta:
        """When new images will be done, beside those that are present, and those that are `stepped` and have yet to
        become pictures. `ready` is the seconds until a checkpoint's components are there.

        Raises QueueFullError where they are too many, DeadlineError where the deadline cannot be met.
        """
        sharing = Sharing(self.weight, self._shares.ahead, ready)
        count = len(present) + stepped
        if count + len(demands) > self.max_images:
            around, missing = self.costs.around(kind_of(demands)), count + len(demands) - self.max_images
            if around and stepped >= missing:  # one after another, they spend what each spends outside of stepping
                room = around * missing / stepped
            else:
                first = forecast(present, self.calls_of, present, sharing, self.adapter_cap).earliest
                room = self.costs.corrected(first + around)
            raise QueueFullError(
                f"{count} images are in the server, and with {len(demands)} more they would exceed the limit of "
                f"{self.max_images}; try again in {room:.1f} s",
                waiting=count,
                maximum=self.max_images,
                eta_ms=round(1000 * room),
            )
        stepping = forecast([*present, *demands], self.calls_of, demands, sharing, self.adapter_cap).latest
        raw = stepping + self.costs.around(kind_of(demands))
        eta = Eta(self.costs.corrected(raw, most_calls(demands)), raw, count + len(demands))
        if deadline is not None and now + eta.seconds > deadline:
            raise DeadlineError(
                f"the request would be done in {eta.seconds:.2f} s, after its deadline of {deadline - now:.2f} s; "
                "allow more time, or ask for fewer steps",
                eta_ms=round(1000 * eta.seconds),
                deadline_ms=round(1000 * (deadline - now)),
            )
        return eta

    def learn(self, demands: Sequence[Demand], eta: Eta, around: float, actual: float) -> None:
        """A request that was admitted with `eta` is done, after `actual` seconds, `around` of them without stepping."""
        self.costs.observe_request(kind_of(demands), most_calls(demands), around, eta.raw, actual)

    @staticmethod
    def is_late(deadline: float | None, now: float) -> bool:
        return deadline is not None and now > deadline

    def level(self, candidate: Candidate, now: float) -> int:
        """Priority with ageing: it grows without bound while an image is not stepped, so none starves."""
        return candidate.priority + int(max(0.0, now - candidate.waiting_since) / self.ageing)

    def row_cap(self, group: Group) -> int:
        """The most rows of a group's next call."""
        most = max(2, self.max_rows(group))
        efficiency = self.brisk if self._calls_since_short < _BRISK_CALLS else self.efficiency
        cap = most if efficiency is None else self.costs.efficient_rows(group, most, efficiency)
        if self.target_step is not None:
            while cap > 2 and self.costs.seconds(group, cap) > self.target_step:
                cap -= 1
        cap = max(2, cap)
        buckets = [bucket for bucket in self.row_buckets(group) if bucket <= most]
        # A bucket is paid for whole, so it is filled.
        return next((bucket for bucket in buckets if bucket >= cap), buckets[-1] if buckets else cap)

    def adapter_cap(self, group: Group) -> int:
        """The most adapters of a group's next call."""
        return max(1, self.max_adapters(group))

    def choose(self, candidates: Sequence[Candidate], now: float) -> Step | None:
        """The next UNet call: images of one group. Without candidates None, and all checkpoints are even again.

        First the checkpoint, by fair shares of the measured time among those that have an image of the highest
        priority, or one that ageing has brought there. In it the highest level first; among equals the client tag that
        had the least work so far; then, of one tag, the group that was called longest ago; within a group the image
        with the least left to do, which keeps short requests short (shortest remaining time first), while ageing bounds
        how long the others wait.
        """
        self._forget_the_gone(candidates)
        if not candidates:
            self._shares.compete(())
            return None
        levels = {one.key: self.level(one, now) for one in candidates}
        checkpoint = self._whose_turn(candidates, levels)
        own = [one for one in candidates if one.group.checkpoint == checkpoint]
        top = max(levels[one.key] for one in own)
        first = min(
            (one for one in own if levels[one.key] == top),
            key=lambda one: (self._served[one.tag], self._called.get(one.group, 0), one.joined),
        )
        group = first.group
        members = [one for one in own if one.group == group]
        cap = self._cap_for_short(members)
        chosen = self._fill(members, levels, cap)
        chosen, rows = self._fit_to_buckets(group, chosen)
        self._calls += 1
        self._called[group] = self._calls
        for one in chosen:
            self._served[one.tag] += one.rows * group.pixels
        expected = self.costs.seconds(group, rows)
        self._shares.charge(checkpoint, expected)
        return Step(tuple(sorted(chosen, key=lambda one: one.joined)), rows, expected)

    def settle(self, step: Step, seconds: float, chunks: int = 1) -> None:
        """The call that `choose` gave is done, after `seconds`, with prompts of so many chunks.

        Until then, and for good where the call failed, its checkpoint is charged what was expected.
        """
        self.costs.observe(step.group, step.rows, seconds, chunks)
        self._shares.charge(step.group.checkpoint, seconds - step.expected)

    def _whose_turn(self, candidates: Sequence[Candidate], levels: Mapping[int, int]) -> str:
        bar = max(one.priority for one in candidates)
        competing: dict[str, list[Candidate]] = {}
        for one in candidates:
            if levels[one.key] >= bar:
                competing.setdefault(one.group.checkpoint, []).append(one)
        self._shares.compete(competing)
        if len(competing) == 1:
            return next(iter(competing))
        return self._shares.next({name: self._borrowing(members) for name, members in competing.items()})

    def _borrowing(self, candidates: Sequence[Candidate]) -> float:
        """The seconds by which a checkpoint may be ahead of its share: some calls of its brief images."""
        rows: dict[Group, int] = {}
        for one in candidates:
            if one.length <= BRIEF:
                rows[one.group] = rows.get(one.group, 0) + one.rows
        calls = (self.costs.seconds(group, min(count, self.row_cap(group))) for group, count in rows.items())
        return BRIEF * max(calls, default=0.0)

    def _cap_for_short(self, candidates: Sequence[Candidate]) -> int:
        """The row cap, with fewer rows while short requests are stepped among long ones, which make their steps long.

        Short is at most a quarter of the median length. Where the short ones fill a call themselves, nothing changes.
        """
        important = max(one.priority for one in candidates)
        lengths = sorted(one.length for one in candidates)
        typical = lengths[len(lengths) // 2]
        short = [one for one in candidates if one.priority == important and _SHORT * one.length <= typical]
        self._calls_since_short = 0 if short else self._calls_since_short + 1
        group = candidates[0].group
        cap = self.row_cap(group)
        rows = min(cap, sum(one.rows for one in short))
        if not rows:
            return cap
        limit = self.stretch * self.costs.seconds(group, rows)
        while cap > max(2, rows) and self.costs.seconds(group, self._padded(group, cap)) > limit:
            cap -= 1
        return cap

    def _forget_the_gone(self, candidates: Sequence[Candidate]) -> None:
        tags = {one.tag for one in candidates}
        groups = {one.group for one in candidates}
        # A tag that comes, or comes back, starts level with the one that had least: it has no credit for its absence.
        floor = min((served for tag, served in self._served.items() if tag in tags), default=0.0)
        self._served = {tag: self._served.get(tag, floor) for tag in tags}
        self._called = {group: call for group, call in self._called.items() if group in groups}

    def _fill(self, candidates: Sequence[Candidate], levels: Mapping[int, int], cap: int) -> list[Candidate]:
        """Candidates in the order of their claim, as many as fit with their adapters.

        Those that only age has put in front get half of the rows: a crowd that waited long must not hold up the
        newcomers for whole calls, which their short waits would not explain.
        """
        fresh = [one for one in candidates if levels[one.key] == one.priority]
        bar = max((one.priority for one in fresh), default=None)
        aged = [] if bar is None else [one for one in candidates if levels[one.key] > max(one.priority, bar - 1)]
        served, adapters = dict(self._served), _Adapters(self.adapter_cap(candidates[0].group))
        first = self._take_turns(aged, levels, max(2, cap // 2), served, adapters)
        taken = {one.key for one in first}
        priorities = levels if bar is None else {one.key: one.priority for one in candidates}
        rest = [one for one in candidates if one.key not in taken]
        return first + self._take_turns(rest, priorities, cap - sum(one.rows for one in first), served, adapters)

    @staticmethod
    def _take_turns(
        candidates: Iterable[Candidate],
        levels: Mapping[int, int],
        cap: int,
        served: dict[str, float],
        adapters: _Adapters,
    ) -> list[Candidate]:
        """The highest level first; in it, tags take turns by the work they had, each with its shortest image.

        An image whose adapter has no room any more lets others pass, which have none or one that is there.
        """
        queues: dict[tuple[int, str], list[Candidate]] = {}
        for one in candidates:
            queues.setdefault((-levels[one.key], one.tag), []).append(one)
        for queue in queues.values():
            queue.sort(key=lambda one: (one.remaining, one.joined), reverse=True)  # the next one is the last
        turns = [(level, served[tag], tag) for level, tag in queues]
        heapq.heapify(turns)
        chosen, rows = list[Candidate](), 0
        while turns and rows < cap:
            level, _, tag = heapq.heappop(turns)
            queue = queues[level, tag]
            one = queue.pop()
            if rows + one.rows <= cap and adapters.take(one.adapter):
                chosen.append(one)
                rows += one.rows
                served[tag] += one.rows * one.group.pixels
            if queue:
                heapq.heappush(turns, (level, served[tag], tag))
        return chosen

    def _fit_to_buckets(self, group: Group, chosen: list[Candidate]) -> tuple[list[Candidate], int]:
        """For fixed row counts: pad to the next one, or fill a smaller one and leave the rest, whichever is cheaper."""
        rows, buckets = sum(one.rows for one in chosen), self.row_buckets(group)
        above = next((bucket for bucket in buckets if bucket >= rows), None)
        if above is None or above == rows:
            return chosen, rows
        below = max((bucket for bucket in buckets if bucket < rows), default=None)
        if below is None:
            return chosen, above
        rest = next(bucket for bucket in buckets if bucket >= rows - below)
        if self.costs.seconds(group, above) <= self.costs.seconds(group, below) + self.costs.seconds(group, rest):
            return chosen, above
        kept, filled = list[Candidate](), 0
        for one in chosen:
            if filled + one.rows <= below:
                kept.append(one)
                filled += one.rows
        return kept, below

    def calls_of(self, group: Group) -> tuple[int, Callable[[int, int], float]]:
        """A group's row cap and what its calls cost, as forecasts take them."""
        return self.row_cap(group), lambda rows, chunks: self.costs.seconds(group, self._padded(group, rows), chunks)

    def _padded(self, group: Group, rows: int) -> int:
        return next((bucket for bucket in self.row_buckets(group) if bucket >= rows), rows)
