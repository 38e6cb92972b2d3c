"""Checkpoints share one device by their weights, on a fake clock: whatever comes, none gets less than its share."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from diffuserve.engine import Candidate, Demand, Group, Shares, Sharing, StepCosts, StepPolicy, forecast
from unit.test_policy import World, one

NAMES = ("a", "b", "c", "d")
SIZES = {name: Group(name, 64, 64) for name in NAMES}
ALIKE = dict.fromkeys(NAMES, 1.0)


def costs(slower: dict[str, float] | None = None) -> StepCosts:
    """Costs that grow with the rows; `slower` are factors by checkpoint."""
    known = StepCosts()
    for name, group in SIZES.items():
        for rows in (1, 2, 4, 8, 16):
            known.observe(group, rows, (slower or ALIKE)[name] * (0.01 + 0.005 * rows))
    return known


def shared(weights: dict[str, float] | None = None, slower: dict[str, float] | None = None, **values: object) -> World:
    policy = {"costs": costs(slower), "max_rows": lambda group: 8, "weight": (weights or ALIKE).__getitem__, **values}
    return World(StepPolicy(**policy))  # type: ignore[arg-type]


def by_name(values: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries(dict.fromkeys(NAMES, values))


def keep_busy(world: World, name: str, length: int, images: int, numbers: list[int], **values: Any) -> None:
    """As many images as there were, new ones in place of those that ended."""
    present = sum(candidate.group.checkpoint == name for candidate in world.active.values())
    for _ in range(images - present):
        numbers[0] += 1
        world.add(one(numbers[0], SIZES[name], remaining=length, **values))


@given(
    by_name(st.floats(0.25, 4.0)),
    by_name(st.floats(0.3, 3.0)),
    st.fixed_dictionaries(dict.fromkeys(NAMES, st.tuples(st.sampled_from((1, 4, 8, 20, 50)), st.integers(1, 9)))),
)
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # it runs for long
def test_busy_checkpoints_get_their_weight_of_the_seconds(
    weights: dict[str, float], slower: dict[str, float], asked: dict[str, tuple[int, int]]
) -> None:
    world, numbers, began = shared(weights, slower), [0], dict.fromkeys(NAMES, 0.0)
    while world.now < 120:
        for name, (length, images) in asked.items():
            keep_busy(world, name, length, images, numbers)
        world.step()
        if world.now < 20:  # what brief ones borrow at the beginning is a second or two
            began = dict(world.seconds)
    seconds = {name: world.seconds[name] - began[name] for name in NAMES}
    for name in NAMES:
        share = weights[name] / sum(weights.values())
        # And a call more or less, of one that has few.
        assert seconds[name] == pytest.approx(share * sum(seconds.values()), rel=0.05, abs=0.16)


@given(
    st.floats(0.2, 5.0),
    st.integers(1, 8),
    st.integers(0, 40),
    st.integers(1, 8),
    st.sampled_from((1, 2)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_brief_request_is_delayed_by_two_steps_of_a_long_one_at_most(
    slower: float, steps: int, before: int, images: int, rows: int, in_the_middle: bool
) -> None:
    world = shared(slower={**ALIKE, "b": slower})
    world.add(*(one(key, SIZES["b"], remaining=50) for key in range(1, images + 1)))
    for _ in range(before):
        world.step()
    long = world.policy.costs.seconds(SIZES["b"], 8)
    arrived = world.now
    if in_the_middle:  # the call that is under way is one of the two
        world.step()
    world.add(one(99, SIZES["a"], rows=rows, remaining=steps))
    while 99 in world.active:
        world.step()
    alone = steps * world.policy.costs.seconds(SIZES["a"], rows)
    assert world.now - arrived <= alone + 2 * long + 1e-9


def test_a_stream_of_brief_requests_takes_no_more_than_its_share() -> None:
    world, numbers = shared({**ALIKE, "b": 3.0}), [0]
    for call in range(4000):
        keep_busy(world, "b", 50, 4, numbers)
        if call % 3:  # it is away now and then: what it borrowed is not forgotten meanwhile
            keep_busy(world, "a", 4, 1, numbers)
        world.step()
    assert world.seconds["b"] / world.now >= 0.75 * 0.98


def test_who_was_away_has_no_credit_and_who_is_alone_no_debt() -> None:
    world, numbers = shared(), [0]
    world.add(one(1, SIZES["a"], remaining=300))
    for _ in range(200):
        world.step()
    world.add(one(2, SIZES["b"], remaining=300))
    before = dict(world.steps)
    for _ in range(100):
        world.step()
    assert world.steps[1] - before[1] == pytest.approx(50, abs=1)
    while world.step():
        pass
    assert world.policy._shares.ahead("a") == world.policy._shares.ahead("b") == 0
    assert numbers == [0]


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(1, 60), st.integers(-2, 2), st.sampled_from(("", "shop"))),
        min_size=1,
        max_size=20,
    ),
    by_name(st.floats(0.25, 4.0)),
)
@settings(max_examples=12, deadline=None)
def test_none_starves_whatever_keeps_coming_elsewhere(
    crowd: list[tuple[str, int, int, str]], weights: dict[str, float]
) -> None:
    """An endless stream of brief, important requests to one checkpoint; all others are stepped all the same."""
    world, numbers = shared({**weights, "a": 4.0}, ageing=1.0), [1000]
    asked = [
        one(key, SIZES[name], remaining=length, priority=priority, tag=tag)
        for key, (name, length, priority, tag) in enumerate(crowd, 1)
    ]
    world.add(*asked)
    while any(candidate.key in world.active for candidate in asked):
        keep_busy(world, "a", 4, 4 + len(crowd), numbers, priority=2)
        world.step()
    # Four levels to the top, then turns by weight, of 1/37 at least, for each of those that wait as long.
    bound = 4.0 + 0.05 * 37 * len(crowd) + 16 * 0.05
    assert all(world.longest_wait.get(candidate.key, 0.0) <= bound for candidate in asked)


def test_a_higher_priority_comes_before_shares_and_age_makes_up_for_it() -> None:
    world = shared({**ALIKE, "b": 4.0}, ageing=1.0)
    world.add(one(1, SIZES["b"], remaining=100), one(2, SIZES["a"], remaining=200, priority=1))
    called = [world.step()[0] for _ in range(300)]
    ages = 1 / world.policy.costs.seconds(SIZES["a"], 2)
    first = called.index(1)
    assert first == pytest.approx(ages, abs=2)
    assert called[first : first + 2] == [1, 2], "and then it is as young as before"


def test_tags_share_a_checkpoint_in_its_share() -> None:
    """Two tags at one checkpoint get half of its share each, and not a third of everything."""
    world = shared(ageing=1e9, max_rows=lambda group: 2)
    asked = ((1, "a", "x"), (2, "a", "y"), (3, "b", "z"))
    world.add(*(one(key, SIZES[name], remaining=5000, tag=tag) for key, name, tag in asked))
    for _ in range(1000):
        world.step()
    assert [world.steps[key] for key in (1, 2, 3)] == pytest.approx([250, 250, 500], abs=2)


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(1, 60), st.integers(1, 2), st.integers(0, 1)),
        min_size=1,
        max_size=24,
    ),
    by_name(st.floats(0.25, 4.0)),
    by_name(st.floats(0.3, 3.0)),
)
@example(  # brief images of two checkpoints, which one after the other must not put a third one ahead
    [("a", 8, 1, 1), ("b", 28, 1, 0), ("d", 8, 1, 0), ("d", 8, 1, 1), ("d", 19, 2, 0)],
    ALIKE,
    {**ALIKE, "a": 0.375, "d": 2.0},
)
# The same crowds each time: of 8,000 random ones, one is further off than this.
@settings(max_examples=200, deadline=None, derandomize=True)
def test_forecasts_play_the_same_order(
    crowd: list[tuple[str, int, int, int]], weights: dict[str, float], slower: dict[str, float]
) -> None:
    """Each checkpoint's last image is done about when the forecast says; a round of calls is as near as it can be."""
    world = shared(weights, slower, efficiency=None, brisk=None, stretch=1e9, ageing=1e9)
    demands: dict[int, Demand] = {}
    for key, (name, length, rows, priority) in enumerate(crowd, 1):
        world.add(one(key, SIZES[name], rows=rows, remaining=length, priority=priority))
        demands[key] = Demand(SIZES[name], rows, length, priority)
    sharing = Sharing(world.policy.weight)
    present = list(demands.values())
    expected = {
        name: forecast(present, world.policy.calls_of, [one for one in present if one.group == SIZES[name]], sharing)
        for name in {name for name, *_ in crowd}
    }
    ended: dict[str, float] = {}
    while True:
        before = dict(world.active)
        if not world.step():
            break
        for key in before.keys() - world.active.keys():
            ended[before[key].group.checkpoint] = world.now
    longest = sum(world.policy.costs.seconds(SIZES[name], 8) for name in NAMES)
    for name, told in expected.items():
        assert told.latest == pytest.approx(ended[name], rel=0.25, abs=2 * longest)


def test_a_checkpoint_that_is_not_there_yet_takes_no_part_until_it_is() -> None:
    seconds = {"a": 1.0, "b": 1.0}
    present = [Demand(SIZES["a"], 1, 10), Demand(SIZES["b"], 1, 10)]
    calls = lambda group: (8, lambda rows, chunks: seconds[group.checkpoint])  # noqa: E731
    sharing = Sharing(ready=lambda name: {"a": 0.0, "b": 6.0}[name])
    assert forecast(present, calls, present[:1], sharing).latest == pytest.approx(6 + 2 * 4)
    assert forecast(present, calls, present[1:], sharing).latest == pytest.approx(20)
    assert forecast(present[1:], calls, present[1:], sharing).latest == pytest.approx(16)


def test_a_call_that_failed_is_charged_what_was_expected() -> None:
    policy = StepPolicy(costs=costs(), max_rows=lambda group: 8)
    crowd: list[Candidate] = [one(1, SIZES["a"], remaining=50), one(2, SIZES["b"], remaining=50)]
    chosen = []
    for _ in range(4):
        step = policy.choose(crowd, 0.0)
        assert step is not None
        chosen.append(step.group.checkpoint)
    assert chosen == ["a", "b", "a", "b"]


def test_what_shares_remember_is_bounded() -> None:
    shares = Shares(lambda name: 1.0)
    for number in range(1000):
        shares.compete([str(number), "stays"])
        shares.charge(shares.next({str(number): 5.0} if number % 100 == 0 else {}), 1.0)
    assert len(shares._times) < 20
