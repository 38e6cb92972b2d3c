"""The step policy against a fake clock: whatever comes, nothing is lost, served twice or starved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffuserve.engine import Candidate, Demand, Eta, Group, StepCosts, StepPolicy, forecast
from diffuserve.errors import DeadlineError, QueueFullError

GROUPS = (Group("a", 64, 64), Group("a", 96, 96), Group("b", 64, 64))
BUCKETS = (2, 4, 6, 8, 12, 16)


def costs(fixed: float = 0.01, row: float = 0.005) -> StepCosts:
    """Costs that grow with the rows, measured for every group."""
    known = StepCosts()
    for group in GROUPS:
        for rows in (1, 2, 4, 8, 16, 32):
            known.observe(group, rows, fixed + row * rows * group.pixels / 4096)
    return known


def make_policy(max_rows: int = 16, **values: object) -> StepPolicy:
    return StepPolicy(**{"costs": costs(), "max_rows": lambda group: max_rows, **values})  # type: ignore[arg-type]


def one(key: int, group: Group = GROUPS[0], rows: int = 2, remaining: int = 10, **values: object) -> Candidate:
    length = values.pop("length", remaining)
    return Candidate(key, group, rows, length, remaining, key, **{"waiting_since": 0.0, **values})  # type: ignore[arg-type]


@dataclass
class World:
    """Images stepped on a fake clock, as the loop would; counts every step that every image gets."""

    policy: StepPolicy
    now: float = 0.0

    def __post_init__(self) -> None:
        self.active: dict[int, Candidate] = {}
        self.steps: dict[int, int] = {}
        self.longest_wait: dict[int, float] = {}
        self.done: list[int] = []
        self.seconds: dict[str, float] = {}

    def add(self, *candidates: Candidate) -> None:
        for candidate in candidates:
            self.active[candidate.key] = replace(candidate, waiting_since=self.now)

    def step(self) -> tuple[int, ...]:
        step = self.policy.choose(list(self.active.values()), self.now)
        assert (step is None) == (not self.active)
        if step is None:
            return ()
        keys = tuple(one.key for one in step.chosen)
        assert len(set(keys)) == len(keys), "served twice in one call"
        assert len({one.group for one in step.chosen}) == 1
        assert list(keys) == sorted(keys), "rows keep their order"
        rows = sum(one.rows for one in step.chosen)
        group = step.chosen[0].group
        assert rows <= step.rows <= self.policy.max_rows(group)
        buckets = self.policy.row_buckets(group)
        assert not buckets or step.rows in buckets
        assert len({one.adapter for one in step.chosen if one.adapter}) <= self.policy.adapter_cap(group)
        for candidate in step.chosen:
            self._count(candidate)
        seconds = self.policy.costs.seconds(group, step.rows)
        self.now += seconds
        self.policy.settle(step, seconds)
        self.seconds[group.checkpoint] = self.seconds.get(group.checkpoint, 0.0) + seconds
        return keys

    def _count(self, candidate: Candidate) -> None:
        key = candidate.key
        assert key in self.active, "a call for an image that is not there"
        self.steps[key] = self.steps.get(key, 0) + 1
        waited = self.now - candidate.waiting_since
        self.longest_wait[key] = max(self.longest_wait.get(key, 0.0), waited)
        if candidate.remaining == 1:
            del self.active[key]
            self.done.append(key)
        else:
            self.active[key] = replace(candidate, remaining=candidate.remaining - 1, waiting_since=self.now)


@st.composite
def crowds(draw: st.DrawFn, most: int = 24) -> list[Candidate]:
    return [
        one(
            key,
            draw(st.sampled_from(GROUPS)),
            rows=draw(st.integers(1, 2)),
            remaining=draw(st.integers(1, 12)),
            priority=draw(st.integers(-2, 2)),
            tag=draw(st.sampled_from(("", "shop", "boards"))),
            adapter=draw(st.sampled_from(((), (), ("a",), ("b",), ("c",), ("a", "b")))),
        )
        for key in range(1, draw(st.integers(0, most)) + 1)
    ]


@given(crowds(), st.sampled_from((2, 3, 8, 16)), st.sampled_from(((), BUCKETS)), st.sampled_from((0, 1, 2, 9)))
@settings(max_examples=60)
def test_every_image_gets_exactly_its_steps(
    crowd: list[Candidate], max_rows: int, buckets: tuple[int, ...], adapters: int
) -> None:
    fitting = tuple(bucket for bucket in buckets if bucket <= max_rows)
    world = World(make_policy(max_rows, row_buckets=lambda group: fitting, max_adapters=lambda group: adapters))
    world.add(*crowd)
    while world.step():
        pass
    assert sorted(world.done) == [candidate.key for candidate in crowd]
    assert world.steps == {candidate.key: candidate.remaining for candidate in crowd}


@given(crowds(8))
@settings(max_examples=30)
def test_none_starves_whatever_keeps_coming(crowd: list[Candidate]) -> None:
    """An endless stream of short, important requests fills every call; the others are stepped all the same."""
    policy = make_policy(4, ageing=1.0, max_adapters=lambda group: 1)
    world = World(policy)
    world.add(*crowd)
    rivals = iter(range(1000, 5000))
    while any(candidate.key in world.active for candidate in crowd):
        while sum(key >= 1000 for key in world.active) < 4:
            world.add(one(next(rivals), GROUPS[0], remaining=1, priority=2))
        world.step()
    # The lowest priority is four levels below: once it waited five ageing periods, and a turn for each of the others.
    bound = 5 * policy.ageing + 1.0
    assert all(world.longest_wait.get(candidate.key, 0.0) <= bound for candidate in crowd)


@given(crowds())
def test_decisions_are_deterministic(crowd: list[Candidate]) -> None:
    runs = []
    for _ in range(2):
        world = World(make_policy(6))
        world.add(*crowd)
        runs.append([world.step() for _ in range(40)])
    assert runs[0] == runs[1]


@given(st.lists(crowds(6), min_size=5, max_size=40))
@settings(max_examples=20)
def test_what_the_policy_remembers_is_bounded(crowd_after_crowd: list[list[Candidate]]) -> None:
    policy = make_policy()
    for number, crowd in enumerate(crowd_after_crowd):
        policy.choose([replace(one, tag=f"tag {number} {one.key}") for one in crowd], float(number))
        assert len(policy._served) <= len(crowd)
        assert len(policy._called) <= len(GROUPS)


def test_short_requests_go_first_and_long_ones_fill_the_call() -> None:
    world = World(make_policy(4))
    world.add(*(one(key, remaining=50) for key in range(1, 9)), one(9, remaining=4))
    assert all(9 in world.step() for _ in range(4))
    assert 9 in world.done


def test_a_few_short_requests_among_long_ones_are_not_slowed_down_by_them() -> None:
    policy = make_policy(32, efficiency=None, brisk=None)
    long = [one(key, remaining=50) for key in range(1, 17)]
    step = policy.choose([*long, one(99, rows=1, remaining=4)], 0.0)
    assert step is not None
    assert 99 in [candidate.key for candidate in step.chosen]
    alone, seconds = policy.costs.seconds(GROUPS[0], 1), policy.costs.seconds(GROUPS[0], step.rows)
    assert alone < seconds <= policy.stretch * alone
    # Many of them fill the call themselves.
    step = policy.choose([*long, *(one(key, rows=2, remaining=4) for key in range(90, 102))], 0.0)
    assert step is not None
    assert step.rows == 32
    # And a long one that is nearly done is no short one.
    step = policy.choose([*long, one(99, rows=1, length=50, remaining=4)], 0.0)
    assert step is not None
    assert step.rows >= 31


def test_a_crowd_that_waited_long_leaves_room_for_newcomers() -> None:
    policy = make_policy(8, efficiency=None, brisk=None, ageing=1.0)
    waited = [one(key, remaining=50, waiting_since=0.0) for key in range(1, 21)]
    newcomers = [one(key, length=50, remaining=40, waiting_since=9.5) for key in range(30, 40)]
    step = policy.choose([*waited, *newcomers], 10.0)
    assert step is not None
    assert sum(candidate.key < 30 for candidate in step.chosen) == 2
    assert sum(candidate.key >= 30 for candidate in step.chosen) == 2


def test_a_newcomer_is_in_the_next_call() -> None:
    world = World(make_policy(4))
    world.add(*(one(key, remaining=50) for key in range(1, 20)))
    for _ in range(10):
        world.step()
    world.add(one(99, remaining=4))
    assert 99 in world.step()


def test_images_without_or_with_the_same_adapter_pass_those_that_find_no_room() -> None:
    world = World(make_policy(16, efficiency=None, max_adapters=lambda group: 2))
    adapters = [("a",), ("b",), ("c",), (), ("a",), ("c",), ()]
    world.add(*(one(key, remaining=5 + key, adapter=adapter) for key, adapter in enumerate(adapters, start=1)))
    assert world.step() == (1, 2, 4, 5, 7)


def test_forecasts_know_how_many_adapters_a_call_takes() -> None:
    known = StepCosts()
    for rows in (1, 16):
        known.observe(GROUPS[0], rows, 1.0)
    demands = [Demand(GROUPS[0], 2, 3, adapter=(name,)) for name in ("a", "b", "a", "c")] + [Demand(GROUPS[0], 2, 3)]
    policy = make_policy(16, costs=known, efficiency=None, max_adapters=lambda group: 1)
    ends = [forecast(demands, policy.calls_of, [one], None, policy.adapter_cap).latest for one in demands]
    assert ends == [3.0, 6.0, 3.0, 9.0, 3.0]
    assert forecast(demands, policy.calls_of, demands).latest == 3.0


def test_priority_is_obeyed_until_age_makes_up_for_it() -> None:
    policy = make_policy(2, ageing=5.0)
    low, high = one(1, priority=0, waiting_since=0.0), one(2, priority=2, waiting_since=0.0)
    step = policy.choose([low, replace(high, waiting_since=4.0)], 4.0)
    assert step is not None
    assert step.chosen[0].key == 2
    step = policy.choose([low, replace(high, waiting_since=15.0)], 15.0)
    assert step is not None
    assert step.chosen[0].key == 1


def test_groups_take_turns() -> None:
    world = World(make_policy(16))
    world.add(one(1, GROUPS[0]), one(2, GROUPS[1]), one(3, GROUPS[2]), one(4, GROUPS[0]))
    steps = [world.step() for _ in range(30)]
    assert [keys for keys in steps if keys != (3,)][:6] == [(1, 4), (2,)] * 3


def test_client_tags_get_equal_shares_however_much_they_ask() -> None:
    world = World(make_policy(4, ageing=1e9))
    world.add(*(one(key, remaining=1000, tag="greedy") for key in range(1, 40)))
    world.add(one(50, remaining=1000, tag="modest"), one(51, remaining=1000, tag="modest"))
    for _ in range(200):
        world.step()
    modest = sum(world.steps.get(key, 0) for key in (50, 51))
    assert modest == pytest.approx(sum(world.steps.values()) / 2, rel=0.02)


def test_a_tag_has_no_credit_for_the_time_it_was_away() -> None:
    world = World(make_policy(2))
    world.add(*(one(key, remaining=1000, tag="old") for key in range(1, 5)))
    for _ in range(100):
        world.step()
    world.add(one(9, remaining=1000, tag="new"))
    for _ in range(100):
        world.step()
    assert world.steps[9] == pytest.approx(50, abs=1)


def test_rows_beyond_what_is_efficient_wait() -> None:
    flat, steep, noisy = StepCosts(), StepCosts(), StepCosts()
    for rows, noise in ((1, 1.1), (2, 0.9), (4, 1.0), (8, 1.2), (16, 0.9), (32, 1.1), (64, 1.0)):
        flat.observe(GROUPS[0], rows, 0.1)
        steep.observe(GROUPS[0], rows, 0.01 * rows)
        noisy.observe(GROUPS[0], rows, noise * (0.01 + 0.004 * rows))
    assert make_policy(64, costs=flat).row_cap(GROUPS[0]) == 64
    assert make_policy(64, costs=steep).row_cap(GROUPS[0]) == 2
    # 0.85 / 0.15 * 0.01 / 0.004 rows, whichever measurements came out low.
    assert make_policy(64, costs=noisy, efficiency=0.85).row_cap(GROUPS[0]) == pytest.approx(14, abs=4)


def test_calls_are_brisk_while_short_requests_keep_coming() -> None:
    policy = make_policy(32)
    long = [one(key, remaining=50) for key in range(1, 17)]

    def rows(*others: Candidate) -> int:
        step = policy.choose([*long, *others], 0.0)
        assert step is not None
        return step.rows

    assert rows() > 20
    rows(one(99, rows=1, remaining=4))
    assert 8 <= rows() <= 14
    for _ in range(30):
        rows()
    assert rows() > 20


def test_a_target_step_time_caps_the_rows() -> None:
    policy = make_policy(32, efficiency=None, brisk=None)
    assert policy.row_cap(GROUPS[0]) == 32
    policy.target_step = 0.05
    assert policy.costs.seconds(GROUPS[0], policy.row_cap(GROUPS[0])) <= 0.05
    policy.target_step = 1e-6
    assert policy.row_cap(GROUPS[0]) == 2


@pytest.mark.parametrize(
    ("twelve", "sixteen", "rows", "expected"),
    [(0.1, 0.11, 14, 16), (0.1, 0.3, 14, 12)],
    ids=["padding is cheaper", "splitting is cheaper"],
)
def test_buckets_are_padded_or_split_by_cost(twelve: float, sixteen: float, rows: int, expected: int) -> None:
    known = StepCosts()
    for bucket, seconds in ((2, 0.02), (4, 0.04), (6, 0.05), (8, 0.07), (12, twelve), (16, sixteen)):
        known.observe(GROUPS[0], bucket, seconds)
    policy = make_policy(16, costs=known, row_buckets=lambda group: BUCKETS)
    chosen, padded = policy._fit_to_buckets(GROUPS[0], [one(key) for key in range(1, rows // 2 + 1)])
    assert padded == expected
    assert sum(candidate.rows for candidate in chosen) == min(rows, expected)


def test_a_full_server_says_how_full_and_for_how_long() -> None:
    policy = make_policy(max_images=3)
    present = [Demand(GROUPS[0], 2, 10) for _ in range(3)]
    policy.admit([Demand(GROUPS[0], 2, 5)], present[:2], 0.0)
    with pytest.raises(QueueFullError, match="3 images are in the server, and with 1 more") as refused:
        policy.admit([Demand(GROUPS[0], 2, 5)], present, 0.0)
    assert refused.value.detail["waiting"] == refused.value.detail["maximum"] == 3
    assert refused.value.detail["eta_ms"] == pytest.approx(1000 * 10 * policy.costs.seconds(GROUPS[0], 6), abs=1)


def test_those_that_are_only_to_be_decoded_take_their_place_until_they_are_pictures() -> None:
    policy = make_policy(max_images=3)
    asked = [Demand(GROUPS[0], 2, 5)]
    assert policy.admit(asked, asked, 0.0, stepped=1).images == 3
    with pytest.raises(QueueFullError) as refused:
        policy.admit(asked, asked, 0.0, stepped=2)
    seconds = policy.costs.seconds(GROUPS[0], 2)
    assert refused.value.detail["eta_ms"] == pytest.approx(5000 * seconds, abs=1), "of decoding nothing is known yet"
    for demands in (asked, 3 * asked):
        policy.learn(demands, Eta(1.0, 1.0), 6.0, 7.0)
    with pytest.raises(QueueFullError, match="3 images are in the server, and with 1 more") as refused:
        policy.admit(asked, asked, 0.0, stepped=2)
    assert refused.value.detail["eta_ms"] == 3000
    with pytest.raises(QueueFullError) as refused:
        policy.admit(3 * asked, asked, 0.0, stepped=2)
    assert refused.value.detail["eta_ms"] == pytest.approx(5000 * seconds + 6000, abs=1), "one more has to be stepped"


def test_a_deadline_that_can_not_be_met_is_refused_with_the_eta() -> None:
    policy = make_policy()
    asked = [Demand(GROUPS[0], 2, 10)]
    eta = policy.admit(asked, [], 5.0)
    assert eta.seconds == pytest.approx(10 * policy.costs.seconds(GROUPS[0], 2))
    assert policy.admit(asked, [], 5.0, 5.0 + eta.seconds) == eta
    with pytest.raises(DeadlineError, match="allow more time") as refused:
        policy.admit(asked, [], 5.0, 4.9 + eta.seconds)
    assert refused.value.detail["eta_ms"] == round(1000 * eta.seconds)


def test_estimates_learn_what_stepping_does_not_explain() -> None:
    policy, asked = make_policy(), [Demand(GROUPS[0], 2, 10)]
    before = policy.admit(asked, [], 0.0)
    for _ in range(12):
        eta = policy.admit(asked, [], 0.0)
        policy.learn(asked, eta, 0.3, before.raw + 0.3)
    assert policy.admit(asked, [], 0.0).seconds == pytest.approx(before.raw + 0.3, rel=0.01)


@given(crowds(), st.sampled_from((2, 8, 16)))
@settings(max_examples=80)
def test_forecasts_are_near_what_happens(crowd: list[Candidate], max_rows: int) -> None:
    """Where nobody else comes, all are done about when the forecast says."""
    crowd = [replace(candidate, tag="", priority=0) for candidate in crowd]
    policy = make_policy(max_rows, efficiency=None, brisk=None, ageing=1e9)
    demands = {candidate.key: Demand(candidate.group, candidate.rows, candidate.remaining) for candidate in crowd}
    world = World(policy)
    world.add(*crowd)
    while world.step():
        pass
    if demands:
        present = list(demands.values())
        whole = forecast(present, policy.calls_of, present).latest
        assert whole == pytest.approx(world.now, rel=0.25, abs=0.1)


def test_the_forecast_is_exact_while_everyone_fits_one_call() -> None:
    policy = make_policy(16, efficiency=None, brisk=None)
    present = [Demand(GROUPS[0], 2, 5), Demand(GROUPS[0], 1, 8), Demand(GROUPS[0], 2, 20)]
    seconds = policy.costs.seconds
    first = 5 * seconds(GROUPS[0], 5)
    second = first + 3 * seconds(GROUPS[0], 3)
    third = second + 12 * seconds(GROUPS[0], 2)
    for demand, expected in zip(present, (first, second, third), strict=True):
        assert forecast(present, policy.calls_of, [demand]).latest == pytest.approx(expected)


def test_a_forecast_of_a_full_server_is_quick() -> None:
    """Admission waits for it: counted in cost lookups, not in seconds."""
    looked_up = 0

    def counted(rows: int, chunks: int) -> float:
        nonlocal looked_up
        looked_up += 1
        return 0.1

    present = [Demand(GROUPS[i % 3], 1 + i % 2, 1 + i % 150) for i in range(256)]
    forecast(present, lambda group: (16, counted), present)
    assert looked_up <= 3 * 256


def test_unmeasured_costs_lie_between_or_beyond_the_measured() -> None:
    known = StepCosts()
    assert known.seconds(GROUPS[0], 8) > 0
    known.observe(GROUPS[0], 4, 0.4)
    assert known.seconds(GROUPS[0], 2) < 0.4 < known.seconds(GROUPS[0], 8)
    known.observe(GROUPS[0], 8, 0.6)
    assert known.seconds(GROUPS[0], 6) == pytest.approx(0.5)
    assert known.seconds(GROUPS[0], 16) == pytest.approx(1.0)
    assert known.seconds(GROUPS[1], 8) == pytest.approx(0.6 * 2.25)
    for _ in range(9):
        known.observe(GROUPS[0], 8, 0.8)
    assert known.seconds(GROUPS[0], 8) == pytest.approx(0.8)


def test_longer_prompts_say_nothing_of_shorter_ones() -> None:
    known = costs()
    before = known.seconds(GROUPS[0], 8)
    for _ in range(40):
        known.observe(GROUPS[0], 8, 1.5 * before, chunks=6)
    assert known.seconds(GROUPS[0], 8) == before
    assert known.seconds(GROUPS[0], 8, chunks=6) == pytest.approx(1.5 * before)
    assert known.seconds(GROUPS[0], 2, chunks=6) == pytest.approx(1.5 * known.seconds(GROUPS[0], 2))
    assert known.seconds(GROUPS[0], 8, chunks=2) == before, "nothing is known of them"
    fresh = StepCosts()
    fresh.observe(GROUPS[0], 8, 0.4, chunks=2)
    assert fresh.seconds(GROUPS[0], 8) == pytest.approx(0.4), "better than nothing"


def test_forecasts_know_what_long_prompts_make_of_a_call() -> None:
    """A call is as long as the least common multiple of what is in it."""
    asked: list[tuple[int, int]] = []

    def seconds(rows: int, chunks: int) -> float:
        asked.append((rows, chunks))
        return chunks

    demands = [Demand(GROUPS[0], 2, 3, chunks=2), Demand(GROUPS[0], 2, 5, chunks=3), Demand(GROUPS[0], 1, 9)]
    assert forecast(demands, lambda group: (16, seconds), demands).latest == 3 * 6 + 2 * 3 + 4 * 1
    assert asked == [(5, 6), (3, 3), (1, 1)]


def test_a_machine_that_became_slower_makes_every_estimate_longer_by_half_of_it() -> None:
    known = costs()
    before = {rows: known.seconds(GROUPS[0], rows) for rows in (2, 8, 64)}
    for _ in range(100):
        known.observe(GROUPS[0], 2, before[2])
    for _ in range(40):
        known.observe(GROUPS[0], 2, 1.44 * before[2])
    assert known.seconds(GROUPS[0], 8) == pytest.approx(1.2 * before[8])
    assert known.seconds(GROUPS[0], 64) == pytest.approx(1.2 * before[64])
    for _ in range(200):
        known.observe(GROUPS[0], 2, 1.44 * before[2])
    # What lasts is usual for what it was measured on, and others are as they were.
    assert known.seconds(GROUPS[0], 2) == pytest.approx(1.44 * before[2])
    assert known.seconds(GROUPS[0], 64) == pytest.approx(before[64])


def test_short_requests_are_told_what_short_ones_took_and_long_ones_what_long_ones_took() -> None:
    known = costs()
    for _ in range(7):
        known.observe_request("", 4, 0.0, forecast=1.0, actual=1.2)
    assert known.corrected(2.0, 4) == 2.0, "too few are chance"
    known.observe_request("", 4, 0.0, forecast=1.0, actual=1.2)
    assert known.corrected(2.0, 50) == pytest.approx(2.4), "better than nothing"
    for _ in range(9):
        known.observe_request("", 50, 0.0, forecast=1.0, actual=1.5)
    assert known.corrected(2.0, 5) == pytest.approx(2.4)
    assert known.corrected(2.0, 40) == pytest.approx(3.0)
    assert known.corrected(2.0) == pytest.approx(3.0), "the usual one of all"
