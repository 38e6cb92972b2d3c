"""Errors survive the wire with their type, their sentence and their detail."""

from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuserve import errors
from diffuserve.errors import DiffuserveError, InternalError, InvalidArgumentError, NotFoundError, from_wire

LEAVES = sorted(
    (
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, DiffuserveError) and value is not DiffuserveError
    ),
    key=lambda kind: kind.code,
)
TEXT = st.text(st.characters(codec="utf-8"))
DETAIL = st.dictionaries(
    st.sampled_from(["input", "value", "minimum", "maximum", "choices", "eta_ms"]),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.lists(TEXT, max_size=3),
    max_size=4,
)


def test_the_codes_are_the_documented_ones() -> None:
    assert [kind.code for kind in LEAVES] == [
        "cancelled",
        "component_failed",
        "deadline",
        "draining",
        "internal",
        "invalid_argument",
        "not_found",
        "queue_full",
        "unavailable",
        "unsupported",
    ]
    drawn = dict(re.findall(r"(\w+Error)\s+([a-z_]+)  ", errors.__doc__ or ""))
    assert drawn.items() <= {kind.__name__: kind.code for kind in LEAVES}.items()
    assert {*errors.__all__} == {kind.__name__ for kind in LEAVES} | {"DEAD_PROCESS", "DiffuserveError", "from_wire"}


# A busy machine is slow now and then, which is no fault of what is tested.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Not a message that ends as if a detail followed: no sentence of ours does.
@given(st.sampled_from(LEAVES), TEXT.filter(lambda text: '{"detail": ' not in text), DETAIL)
@patient
def test_an_error_survives_the_wire(kind: type[DiffuserveError], message: str, detail: dict[str, object]) -> None:
    original = kind(message, **detail)
    for text in (original.to_wire(), f"[request id: <id_unknown>] in model 'a' {original.to_wire()}"):
        read = from_wire(text)
        assert type(read) is kind
        assert (read.message, read.detail, str(read)) == (message, detail, message)


def test_detail_holds_what_json_cannot_as_text() -> None:
    read = from_wire(InvalidArgumentError("a", value=1 + 2j, choices=("x", "y")).to_wire())
    assert read is not None
    assert read.detail == {"value": "(1+2j)", "choices": ["x", "y"]}


def test_the_outer_error_is_the_one_that_is_read() -> None:
    read = from_wire("[not_found] the engine said [internal] no")
    assert type(read) is NotFoundError
    assert read.message == "the engine said [internal] no"


@pytest.mark.parametrize(
    "text", ["", "Request for unknown model: 'x' is not found", "[nonsense] a", "[request id: 1] a", "[internal]"]
)
def test_other_texts_are_not_ours(text: str) -> None:
    assert from_wire(text) is None


def test_a_broken_detail_does_not_hide_the_sentence() -> None:
    read = from_wire('[internal] a {"detail": {nonsense}}')
    assert type(read) is InternalError
    assert (read.message, read.detail) == ("a", {})
    read = from_wire('[internal] a {"detail": 3} extra}')
    assert type(read) is InternalError
    assert read.detail == {}
