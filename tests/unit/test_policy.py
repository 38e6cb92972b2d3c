"""The step policy's decisions, for any mix of candidates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.engine import Candidate, StepPolicy
from diffuserve.errors import QueueFullError


@st.composite
def crowds(draw: st.DrawFn) -> list[Candidate]:
    size = draw(st.integers(0, 24))
    return [
        Candidate(
            key=key,
            group=draw(st.sampled_from("abc")),
            rows=draw(st.integers(1, 2)),
            last_stepped=draw(st.integers(0, 5)),
            joined=key,
        )
        for key in range(size)
    ]


@given(crowds(), st.integers(2, 16))
def test_a_call_has_one_group_within_its_rows_and_no_one_twice(crowd: list[Candidate], max_rows: int) -> None:
    chosen = StepPolicy(max_rows=max_rows).choose(crowd)
    assert bool(chosen) == bool(crowd)
    assert len({one.group for one in chosen}) <= 1
    assert sum(one.rows for one in chosen) <= max_rows
    assert len({one.key for one in chosen}) == len(chosen)
    assert set(chosen) <= set(crowd)


@given(crowds(), st.integers(2, 16))
def test_whoever_waited_longest_is_stepped(crowd: list[Candidate], max_rows: int) -> None:
    chosen = StepPolicy(max_rows=max_rows).choose(crowd)
    if crowd:
        assert min(one.last_stepped for one in chosen) == min(one.last_stepped for one in crowd)


@given(crowds(), st.integers(2, 16))
def test_no_one_starves(crowd: list[Candidate], max_rows: int) -> None:
    policy, last = StepPolicy(max_rows=max_rows), {one.key: one.last_stepped for one in crowd}
    stepped = set[int]()
    for call in range(6, 6 + len(crowd)):
        now = [Candidate(one.key, one.group, one.rows, last[one.key], one.joined) for one in crowd]
        for one in policy.choose(now):
            last[one.key] = call
            stepped.add(one.key)
    assert stepped == {one.key for one in crowd}


def test_free_room_is_filled() -> None:
    crowd = [Candidate(key, "a", 2, 0, key) for key in range(10)]
    assert len(StepPolicy(max_rows=8).choose(crowd)) == 4
    assert len(StepPolicy(max_rows=64).choose(crowd)) == 10


def test_a_full_server_says_how_full() -> None:
    policy = StepPolicy(max_rows=8, max_requests=3)
    policy.admit(2)
    with pytest.raises(QueueFullError, match="3 requests are in the server, and at most 3") as refused:
        policy.admit(3)
    assert refused.value.detail == {"waiting": 3, "maximum": 3}
