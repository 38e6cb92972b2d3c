"""The room for adapters of requests under way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diffuserve.lora.room import AdapterRoom


def test_equal_adapters_take_room_once_and_go_with_the_last_user() -> None:
    room = AdapterRoom(10)
    assert room.take("a", "x", 6)
    assert room.take("b", "x", 6)
    assert not room.take("c", "y", 6)
    assert not room.release("a")
    assert room.release("b")
    assert room.take("c", "y", 6)
    assert room.bytes == 6


def test_what_is_larger_than_all_room_is_let_in_alone() -> None:
    room = AdapterRoom(1)
    assert room.take("a", "x", 6)
    assert not room.take("b", "y", 1)
    assert room.release("a")
    assert room.take("b", "y", 1)


def test_who_may_not_grow_may_share() -> None:
    room = AdapterRoom(100)
    assert room.take("a", "x", 6)
    assert not room.take("b", "y", 6, may_grow=False)
    assert room.take("c", "x", 6, may_grow=False)
    assert room.take("a", "x", 6, may_grow=False), "asked again"


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_the_budget_is_kept_whoever_comes_and_goes(acts: list[tuple[int, bool]]) -> None:
    room, users = AdapterRoom(25), dict[int, int]()
    for user, comes in acts:
        if comes:
            if room.take(user, user % 5, 10):
                users[user] = user % 5
        else:
            left = users.pop(user, None)
            assert room.release(user) == (left is not None and left not in users.values())
        assert room.bytes == 10 * len(set(users.values())) <= 25
