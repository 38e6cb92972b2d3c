"""Which components are in memory, on a fake clock: the budget holds, nobody loses what it uses, all are served."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffuserve.errors import UnsupportedError
from diffuserve.residency import Action, Limits, Residency, first_residents

NAMES = ("a", "b", "c", "d")


@dataclass
class World:
    """A residency, and the requests that come to it; carries out each action in some seconds."""

    residency: Residency
    now: float = 0.0
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    waiting: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    memory: dict[str, int] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    action: Action | None = None
    ends: float = 0.0

    def ask(self, name: str) -> None:
        if self.residency.enter(name, self.now):
            self._use(name)
        else:
            self.waiting[name].append(self.now)

    def end(self, name: str) -> None:
        if self.inside[name]:
            self.inside[name] -= 1
            self.residency.leave(name, self.now, inside=True)

    def _use(self, name: str) -> None:
        assert self.residency._ones[name].models.keys() <= self.memory.keys(), "let in without its components"
        self.inside[name] += 1

    def turn(self, seconds: float, takes: float = 1.0, failing: str = "") -> None:
        """Let time pass; begin or end an action, and let in who may."""
        self.now += seconds
        if self.action is not None and self.now >= self.ends:
            self._finish(failed=self.action.kind == "load" and self.action.checkpoint == failing)
        for name in NAMES:
            if self.waiting[name] and self.residency.let_in(name):
                self.waits += [self.now - since for since in self.waiting[name]]
                for _ in self.waiting[name]:
                    self._use(name)
                self.waiting[name] = []
        action = self.residency.decide(self.now)
        if action is not None:
            assert self.action is None
            self.action, self.ends = action, self.now + takes
            self._begin(action)
        budget = self.residency.limits.budget
        assert budget is None or sum(self.memory.values()) <= budget
        assert self.residency.bytes == sum(self.memory.values())

    def _begin(self, action: Action) -> None:
        models = self.residency._ones[action.checkpoint].models
        if action.kind == "load":
            assert not set(action.models) & self.memory.keys(), "loaded twice"
            self.memory |= {model: models[model] for model in action.models}
            self.loads.append(self.now)
            return
        for name in NAMES:
            if self.inside[name]:
                assert not set(action.models) & self.residency._ones[name].models.keys(), f"{name} is in use"

    def _finish(self, *, failed: bool) -> None:
        assert self.action is not None
        if self.action.kind == "unload" or failed:
            for model in self.action.models:
                del self.memory[model]
        self.residency.done(self.action, self.now, 1.0, failed=failed)
        self.action = None


def make(budget: int | None = 20, pinned: str = "", **limits: float) -> World:
    """Four checkpoints of 10: 6 of their own, and 4 that a and b, and c and d, have in common."""
    residency = Residency(Limits(budget=budget, **limits))  # type: ignore[arg-type]
    for name in NAMES:
        shared = "ab" if name in "ab" else "cd"
        residency.add(name, {f"{name}_unet": 6, f"{shared}_vae": 4}, pinned=name in pinned)
    return World(residency)


events = st.lists(
    st.tuples(st.sampled_from(("ask", "ask", "end", "end", "turn")), st.sampled_from(NAMES), st.floats(0, 3)),
    max_size=120,
)


@given(events, st.sampled_from((10, 14, 16, 20, 26, 40, None)), st.sampled_from(("", "a")), st.sampled_from((0.0, 4.0)))
@settings(max_examples=150, deadline=None)
def test_the_budget_holds_and_everybody_is_served(
    happenings: list[tuple[str, str, float]], budget: int | None, pinned: str, idle: float
) -> None:
    world = make(budget, pinned, idle=idle, stay=2.0, loads=10)
    served = list[str]()
    for name in NAMES:
        try:
            world.residency.check(name)
            served.append(name)
        except UnsupportedError:
            assert budget is not None
            assert budget < 16 + (0 if name in "ab" and pinned else 4)
    for kind, name, seconds in happenings:
        if kind == "ask" and name in served:
            world.ask(name)
        elif kind == "end":
            world.end(name)
        world.turn(seconds if kind == "turn" else 0.01, takes=0.5)
    for _ in range(2000):
        for name in NAMES:
            world.end(name)
        world.turn(0.25, takes=0.5)
        if not any(world.waiting.values()) and not any(world.inside.values()):
            break
    assert not any(world.waiting.values()), "somebody waits forever"
    for first in world.loads:
        assert sum(first <= load < first + 60 for load in world.loads) <= 10


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_all_busy_take_turns_without_thrashing(seed: int) -> None:
    """Every checkpoint always has requests, and there is room for two: loads follow the stay, not the requests."""
    world = make(20, stay=5.0, loads=60)
    for second in range(seed % 7, 4000):
        for name in NAMES:
            world.end(name)
            if not world.waiting[name] and not world.inside[name]:
                world.ask(name)
        world.turn(0.1, takes=0.3)
        del second
    assert 4 <= len(world.loads) <= world.now / 5.0 * 2 + 4
    assert max(world.waits) <= 3 * (5.0 + 4 * 0.3 + 2)


def test_shared_components_are_counted_once_and_leave_with_their_last_user() -> None:
    world = make(16, stay=0.0)
    for name in "ab":
        world.ask(name)
    for _ in range(5):
        world.turn(1.0)
    assert world.memory == {"a_unet": 6, "b_unet": 6, "ab_vae": 4}
    world.end("a")
    world.ask("c")
    for _ in range(5):
        world.turn(1.0)
    assert "ab_vae" in world.memory, "b uses it"
    assert "a_unet" not in world.memory
    assert world.inside["c"] == 0
    world.end("b")
    for _ in range(5):
        world.turn(1.0)
    assert world.memory == {"c_unet": 6, "cd_vae": 4}
    assert world.inside["c"] == 1


def test_the_one_used_longest_ago_leaves_and_pinned_ones_stay() -> None:
    world = make(30, pinned="a", stay=0.0)
    for name in "abcd":
        world.ask(name)
        for _ in range(3):
            world.turn(1.0)
        world.end(name)
    assert {model for model in world.memory if "unet" in model} == {"a_unet", "c_unet", "d_unet"}


def test_idle_ones_leave_after_their_time_and_0_is_never() -> None:
    for idle, left in ((30.0, 0), (0.0, 1)):
        world = make(None, idle=idle)
        world.ask("a")
        world.turn(1.0)
        world.turn(1.0)
        world.end("a")
        assert world.residency.due(world.now) <= 31.0
        for _ in range(29):
            world.turn(1.0)
        assert len(world.memory) == 2
        for _ in range(1000):
            world.turn(1.0)
        assert len(world.memory) == 2 * left


def test_loads_are_bounded_and_those_that_fail_are_not_tried_at_once() -> None:
    world = make(None, loads=3, retry=20.0)
    world.ask("a")
    world.turn(1.0, failing="a")
    world.turn(1.0, failing="a")
    assert world.residency.is_refused("a", world.now)
    assert world.memory == {}
    world.residency.leave("a", world.now, inside=False)
    world.waiting["a"] = []
    for name in "bcd":
        world.ask(name)
    for _ in range(20):
        world.turn(1.0)
    assert len(world.loads) == 3
    assert world.residency.wait("d", world.now) > 30
    for _ in range(60):
        world.turn(1.0)
    assert world.inside == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert not world.residency.is_refused("a", world.now)


def test_a_wait_is_what_loads_take_and_those_before() -> None:
    world = make(None)
    world.ask("a")
    world.turn(1.0)
    world.turn(1.0)
    assert world.residency.wait("a", world.now) == 0.0
    assert world.residency.wait("b", world.now) == pytest.approx(1.0)
    world.ask("c")
    assert world.residency.wait("b", world.now) == pytest.approx(2.0)


def test_a_server_begins_with_what_is_pinned_and_what_fits() -> None:
    models = {"a": {"a": 6, "v": 4}, "b": {"b": 6, "w": 4}, "c": {"c": 6, "v": 4}}
    assert first_residents(models, (), None) == ("a", "b", "c")
    assert first_residents(models, (), 16) == ("a", "c")
    assert first_residents(models, ("b",), 16) == ("b",)


def test_one_that_comes_again_has_the_requests_that_it_had() -> None:
    residency = Residency(Limits(retry=60.0))
    residency.add("a", {"old": 1})
    assert not residency.enter("a", 0.0)
    action = residency.decide(0.0)
    assert action is not None
    residency.done(action, 1.0, 1.0, failed=True)
    residency.retire("a")
    residency.add("a", {"new": 2})
    assert residency.decide(1.0) == Action("load", "a", ("new",)), "somebody waits for it, and no failure is its own"
    residency.done(Action("load", "a", ("new",)), 2.0, 1.0)
    assert residency.let_in("a")
    residency.leave("a", 3.0, inside=True)
    assert residency.status("a", 3.0)["requests"] == residency.status("a", 3.0)["waiting"] == 0
