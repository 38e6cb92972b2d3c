"""Which checkpoints' components are in memory: decisions on bytes, users and clocks alone, carried out elsewhere.

    enter -> (resident: at once | else: waits) -> decide -> Action -> done -> those that waited enter

Components are Triton models. One that several checkpoints name is counted once, and leaves with its last user. Times
are seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from diffuserve.errors import UnsupportedError

__all__ = ["Action", "Limits", "Residency", "first_residents"]

_WINDOW: Final = 60.0
_UNMEASURED_S: Final = 2.0  # of a load, before any was measured: a process that starts
_UNMEASURED_BYTES_A_SECOND: Final = 500e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """budget  bytes of all components that are loaded, on their way in or out; None: no limit
    idle       seconds without a request after which a checkpoint leaves; 0: never
    stay       seconds that a checkpoint stays at least, once it was loaded, before it must make room
    loads      the most loads in any minute
    retry      seconds after a load that failed in which the checkpoint's requests are refused at once
    """

    budget: int | None = None
    idle: float = 900.0
    stay: float = 10.0
    loads: int = 12
    retry: float = 5.0


@dataclass(frozen=True, slots=True)
class Action:
    """Load or unload these Triton models, in their order, for a checkpoint."""

    kind: Literal["load", "unload"]
    checkpoint: str
    models: tuple[str, ...]


@dataclass(slots=True)
class _One:
    """One checkpoint. `open` lets its requests in; one that is resident and not open waits for its last to end."""

    models: Mapping[str, int]
    pinned: bool
    retired: bool = False
    failed: bool = False
    state: Literal["absent", "loading", "resident", "unloading"] = "absent"
    open: bool = False
    users: int = 0
    waiting: int = 0
    waiting_since: float = 0.0
    last_use: float = -math.inf
    loaded_at: float = -math.inf
    refused_until: float = -math.inf
    loads: int = 0
    unloads: int = 0
    load_seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.models.values())

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it, or it should be there anyway; once it failed, somebody must ask."""
        return self.waiting > 0 or (self.pinned and not self.failed)


class Residency:
    """Not thread safe. Of actions, one is under way at a time: `decide` gives it, and `done` is told of its end.

    Whoever waits longest is served next: pinned checkpoints first, then those with requests, in the order in which
    their first one came. Where there is no room, the one leaves that has nothing to do and was used longest ago; where
    all have something to do, the one that came longest ago takes no new requests and leaves with the last that it has.
    Nobody has to leave before `stay` is over, so each waits for a bounded time, and components do not come and go with
    each request.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._ones: dict[str, _One] = {}
        self._loaded: dict[str, int] = {}
        self._recent: deque[float] = deque()
        self._acting: Action | None = None
        self._bytes_a_second = 0.0

    def add(self, name: str, models: Mapping[str, int], *, pinned: bool = False) -> None:
        """Have a checkpoint, with the bytes that each of its Triton models takes; none of it is in memory.

        One that comes again is tried at once, and has the requests that it had.
        """
        known = self._ones.get(name, _One(models, pinned))
        self._ones[name] = replace(
            known, models=dict(models), pinned=pinned, retired=False, failed=False, refused_until=-math.inf
        )

    def retire(self, name: str) -> None:
        """Take no new requests of a checkpoint; it leaves with its last one."""
        one = self._ones[name]
        one.retired, one.pinned, one.open = True, False, False

    def found(self, name: str, now: float) -> None:
        """A checkpoint's models turned out to be in memory."""
        one = self._ones[name]
        one.state, one.open, one.loaded_at, one.last_use = "resident", True, now, now
        self._loaded |= one.models

    def check(self, name: str) -> None:
        """Raise UnsupportedError where a checkpoint can never be in memory beside what is pinned."""
        budget = self.limits.budget
        if budget is None:
            return
        always = {model: size for one in self._ones.values() if one.pinned for model, size in one.models.items()}
        needed = sum((always | dict(self._ones[name].models)).values())
        if needed > budget:
            raise UnsupportedError(
                f"{name} needs {self._ones[name].bytes / 1e9:.2f} GB, with all that is pinned {needed / 1e9:.2f} GB, "
                f"and the server's memory budget is {budget / 1e9:.2f} GB; raise the budget, or ask another checkpoint",
                checkpoint=name,
                bytes=needed,
                maximum=budget,
            )

    def enter(self, name: str, now: float) -> bool:
        """A request came. Whether it may run now; else it waits, until `let_in` or `leave`."""
        one = self._ones[name]
        one.last_use = now
        if one.open:
            one.users += 1
            return True
        if not one.waiting:
            one.waiting_since = now
        one.waiting += 1
        return False

    def let_in(self, name: str) -> bool:
        """Whether all that wait for a checkpoint may run; then they do."""
        one = self._ones[name]
        if one.open:
            one.users, one.waiting = one.users + one.waiting, 0
        return one.open

    def leave(self, name: str, now: float, *, inside: bool) -> None:
        """A request is over, which ran (`inside`) or waited."""
        one = self._ones[name]
        one.last_use = now
        if inside:
            one.users -= 1
        else:
            one.waiting -= 1

    def hold(self, name: str, count: int) -> None:
        """Keep an open checkpoint in memory, or let go of it (-1), on nobody's behalf: that is no use of it."""
        self._ones[name].users += count

    def is_open(self, name: str) -> bool:
        """Whether a checkpoint's components are in memory, and its requests may run."""
        return self._ones[name].open

    def may_use(self, model: str) -> bool:
        """Whether a Triton model is one that should be in memory."""
        return any(model in one.models and one.state == "resident" for one in self._ones.values())

    def is_refused(self, name: str, now: float) -> bool:
        """Whether its last load failed a moment ago."""
        return now < self._ones[name].refused_until

    @property
    def bytes(self) -> int:
        """Of all that is in memory, on its way in or out."""
        return sum(self._loaded.values())

    def decide(self, now: float) -> Action | None:
        """What to do now, which is then under way; None where there is nothing, or something is under way."""
        if self._acting is not None:
            return None
        self._reopen()
        action = self._release(now) or self._load(now)
        if action is not None:
            one = self._ones[action.checkpoint]
            self._acting = action
            one.open = False
            one.state = "loading" if action.kind == "load" else "unloading"
            if action.kind == "load":
                self._recent.append(now)
                self._loaded |= {model: one.models[model] for model in action.models}
        return action

    def done(self, action: Action, now: float, seconds: float, *, failed: bool = False) -> None:
        """An action is over. One that failed to load left nothing of its models in memory."""
        one = self._ones[action.checkpoint]
        self._acting = None
        if action.kind == "load" and not failed:
            one.state, one.open, one.loaded_at = "resident", True, now
            one.last_use = max(one.last_use, now)
            one.loads, one.load_seconds = one.loads + 1, seconds
            self._bytes_a_second = one.bytes / max(seconds, 1e-3)
            return
        one.state, one.failed = "absent", failed
        if failed:
            one.refused_until = now + self.limits.retry
        else:
            one.unloads += 1
        for model in action.models:
            self._loaded.pop(model, None)

    def due(self, now: float) -> float:
        """Seconds until `decide` may say something that it does not say now, though nobody comes or goes."""
        times = [self._recent[0] + _WINDOW] if self._recent else []
        for one in self._ones.values():
            if one.state == "resident" and not one.pinned:
                times += [one.loaded_at + self.limits.stay]
                times += [one.last_use + self.limits.idle] if self.limits.idle else []
            if one.state == "absent":
                times.append(one.refused_until)
        return min((time - now for time in times if time > now), default=math.inf)

    def wait(self, name: str, now: float) -> float:
        """The seconds until a request that comes now would be let in, as far as can be told."""
        one = self._ones[name]
        if one.open:
            return 0.0
        queue = [other for other in self._queue(now) if other is not one]
        before = sum(self._seconds(other) for other in queue)
        if one.state == "resident":
            return before + self._seconds(one)
        room = 0.0
        budget = self.limits.budget
        if budget is not None and self.bytes + self._missing_bytes(one) > budget:
            stays = [other.loaded_at + self.limits.stay - now for other in self._movable()]
            room = max(0.0, min(stays, default=0.0))
        rate = max(0.0, self._recent[0] + _WINDOW - now) if len(self._recent) >= self.limits.loads else 0.0
        return max(room, rate) + before + self._seconds(one)

    def status(self, name: str, now: float) -> dict[str, Any]:
        """What there is to tell of a checkpoint."""
        one = self._ones[name]
        return {
            "state": "leaving" if one.state == "resident" and not one.open else one.state,
            "resident": one.state == "resident",
            "bytes": one.bytes,
            "pinned": one.pinned,
            "requests": one.users,
            "waiting": one.waiting,
            "last_use_s": round(now - one.last_use, 1) if one.last_use > -math.inf else None,
            "loads": one.loads,
            "unloads": one.unloads,
            "load_s": round(one.load_seconds, 3),
        }

    def _queue(self, now: float) -> list[_One]:
        """Who should be loaded, the next one first."""
        wanted = [
            one for one in self._ones.values() if one.state == "absent" and one.is_wanted and now >= one.refused_until
        ]
        return sorted(wanted, key=lambda one: (not one.pinned, one.waiting_since))

    def _seconds(self, one: _One) -> float:
        if one.load_seconds:
            return one.load_seconds
        if self._bytes_a_second:
            return one.bytes / self._bytes_a_second
        return _UNMEASURED_S + one.bytes / _UNMEASURED_BYTES_A_SECOND

    def _movable(self) -> list[_One]:
        return [one for one in self._ones.values() if one.state == "resident" and not one.pinned]

    def _missing_bytes(self, one: _One) -> int:
        return sum(size for model, size in one.models.items() if model not in self._loaded)

    def _own(self, one: _One) -> tuple[str, ...]:
        """The models that only this checkpoint keeps in memory."""
        others = {
            model
            for other in self._ones.values()
            if other is not one and other.state in ("resident", "loading")
            for model in other.models
        }
        return tuple(model for model in one.models if model not in others)

    def _reopen(self) -> None:
        """Whoever was to make room stays where nobody wants it any more."""
        if not any(one.state == "absent" and one.is_wanted for one in self._ones.values()):
            for one in self._movable():
                one.open = not one.retired

    def _release(self, now: float) -> Action | None:
        """Unload what has been idle for long, and what was told to leave; and what was found beyond the budget."""
        budget = self.limits.budget
        over = budget is not None and self.bytes > budget
        for name, one in self._idle():
            long_idle = self.limits.idle and now - one.last_use >= self.limits.idle and not one.waiting
            if long_idle or not one.open or (over and self._own(one)):
                return Action("unload", name, self._own(one))
        return None

    def _idle(self) -> list[tuple[str, _One]]:
        """Who could leave, the one that was used longest ago first."""
        idle = [(name, one) for name, one in self._ones.items() if one.state == "resident" and not one.pinned]
        return sorted(((name, one) for name, one in idle if not one.users), key=lambda pair: pair[1].last_use)

    def _load(self, now: float) -> Action | None:
        while self._recent and now - self._recent[0] >= _WINDOW:
            self._recent.popleft()
        queue = self._queue(now)
        if not queue or len(self._recent) >= self.limits.loads:
            return None
        one = queue[0]
        name = next(name for name, other in self._ones.items() if other is one)
        budget = self.limits.budget
        lacking = 0 if budget is None else self.bytes + self._missing_bytes(one) - budget
        if lacking <= 0:
            return Action("load", name, tuple(model for model in one.models if model not in self._loaded))
        return self._make_room(one, lacking, now)

    def _make_room(self, wanting: _One, lacking: int, now: float) -> Action | None:
        """Unload whoever has nothing to do; else tell whoever came longest ago to end with what it has."""

        def frees(one: _One) -> int:
            return sum(one.models[model] for model in self._own(one) if model not in wanting.models)

        stayed = [one for one in self._movable() if now - one.loaded_at >= self.limits.stay and frees(one)]
        for name, one in self._idle():
            if one in stayed:
                return Action("unload", name, self._own(one))
        lacking -= sum(frees(one) for one in self._movable() if not one.open)
        for one in sorted(stayed, key=lambda one: one.loaded_at):
            if lacking > 0 and one.open:
                one.open = False
                lacking -= frees(one)
        return None


def first_residents(
    models: Mapping[str, Mapping[str, int]], pinned: Iterable[str], budget: int | None
) -> tuple[str, ...]:
    """The checkpoints that a server begins with: pinned ones, then the others in their order while all fit.

    `models` are each checkpoint's Triton models with their bytes.
    """
    chosen: dict[str, None] = {}
    taken: dict[str, int] = {}
    pins = set(pinned)
    for name in sorted(models, key=lambda name: name not in pins):
        together = taken | dict(models[name])
        if name in pins or budget is None or sum(together.values()) <= budget:
            chosen[name] = None
            taken = together
    return tuple(name for name in models if name in chosen)
