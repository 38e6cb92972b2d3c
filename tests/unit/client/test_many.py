"""generate_many: how many requests are under way, and whose result comes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve_client import (
    Client,
    ComponentFailedError,
    Event,
    GenerateRequest,
    GenerateResult,
    InvalidArgumentError,
)
from diffuserve_client._many import Gathering
from unit.client.fake_triton import FakeTriton, answer, failure, image, response, silence


def named(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    yield response(image(data=request.prompt.encode(), seed=request.seed), final=True)


def data_of(results: Any) -> list[bytes]:
    return [one.images[0].data for one in results]


def result(index: int) -> GenerateResult:
    return GenerateResult(request=GenerateRequest(prompt="a"), images=(), index=index)


def test_results_come_in_order_or_as_they_are_done(client: Client, fake: FakeTriton) -> None:
    others_done = threading.Event()

    def first_waits(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.prompt == "0":
            assert others_done.wait(30)
        yield from named(fake, request)

    def hear(index: int, _: Event) -> None:
        ended.add(index)
        if ended == {1, 2, 3}:
            others_done.set()

    fake.script = first_waits
    ended: set[int] = set()
    results = list(client.generate_many(list("0123"), concurrency=4, on_event=hear))
    assert data_of(results) == [b"0", b"1", b"2", b"3"]
    assert [one.index for one in results] == [0, 1, 2, 3]
    assert len({one.request_id for one in results}) == 4
    others_done.clear()
    as_done = client.generate_many(list("0123"), concurrency=4, in_order=False)
    assert {one.index for one in islice(as_done, 3)} == {1, 2, 3}
    others_done.set()
    assert [one.index for one in as_done] == [0]


def test_requests_are_read_as_they_are_needed_and_leaving_cancels_the_rest(client: Client, fake: FakeTriton) -> None:
    read: list[int] = []

    def endless() -> Iterator[GenerateRequest]:
        for number in count():
            read.append(number)
            yield GenerateRequest(prompt=str(number), seed=number)

    begun = threading.Event()

    def third_waits(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.seed != 2:
            yield from named(fake, request)
            return
        fake.over.clear()  # what was set by those before
        begun.set()
        yield from silence(fake, request)

    fake.script = third_waits
    with closing(client.generate_many(endless(), concurrency=2)) as results:
        assert data_of(islice(results, 2)) == [b"0", b"1"]
        assert begun.wait(10)
    assert fake.over.wait(10), "the third was cancelled"
    assert len(read) <= 6, "two are under way, two were done, and two may be held"


def test_the_first_error_ends_it_and_says_whose_it_is(client: Client, fake: FakeTriton) -> None:
    def second_fails(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.prompt == "1":
            yield failure(InvalidArgumentError("no such size"))
        else:
            yield from named(fake, request)

    fake.script = second_fails
    results = client.generate_many(list("0123"), concurrency=1)
    assert next(results).index == 0
    with pytest.raises(InvalidArgumentError, match="no such size") as caught:
        next(results)
    assert caught.value.detail["index"] == 1
    mixed = list(client.generate_many(list("0123"), concurrency=2, return_errors=True))
    assert [isinstance(one, GenerateResult) for one in mixed] == [True, False, True, True]
    assert isinstance(mixed[1], InvalidArgumentError)
    assert mixed[1].detail["index"] == 1


def test_a_bug_in_the_callers_requests_is_raised(client: Client, fake: FakeTriton) -> None:
    def broken() -> Iterator[GenerateRequest]:
        yield GenerateRequest(prompt="a")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        list(client.generate_many(broken(), concurrency=1))
    with pytest.raises(InvalidArgumentError, match="steps is 0"):
        list(client.generate_many(GenerateRequest(prompt="a", steps=steps) for steps in (1, 0)))


def test_what_is_no_request_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="whose letters would be a request each"):
        client.generate_many("a red circle")
    requests: Any = [GenerateRequest(prompt="a"), None, "b"]
    with pytest.raises(TypeError, match="request 1 is NoneType"):
        list(client.generate_many(requests))


def test_events_are_heard_with_their_index(client: Client) -> None:
    heard: list[tuple[int, Event]] = []
    requests = [GenerateRequest(prompt="a", steps=2, progress_every=1) for _ in range(2)]
    list(client.generate_many(requests, on_event=lambda index, event: heard.append((index, event))))
    assert sorted((index, event.kind, event.step) for index, event in heard) == [
        (0, "image", 0),
        (0, "progress", 1),
        (0, "progress", 2),
        (1, "image", 0),
        (1, "progress", 1),
        (1, "progress", 2),
    ]


def test_an_error_in_on_event_is_raised(client: Client, fake: FakeTriton) -> None:
    def fail(index: int, event: Event) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        list(client.generate_many(["a"], on_event=fail, return_errors=True))


@pytest.mark.parametrize("concurrency", [0, -1, 1025])
def test_concurrency_has_limits(client: Client, concurrency: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"concurrency is {concurrency}, and must be from 1 to 1024"):
        client.generate_many(["a"], concurrency=concurrency)


def test_nothing_asked_is_nothing_made(client: Client, fake: FakeTriton) -> None:
    assert list(client.generate_many([])) == []
    fake.script = answer
    assert len(list(client.generate_many(["a"]))) == 1


@given(st.data(), st.integers(1, 5), st.integers(0, 30), st.booleans())
def test_whatever_ends_first_each_result_comes_once(data: Any, concurrency: int, total: int, in_order: bool) -> None:
    gathering = Gathering(
        (GenerateRequest(prompt=str(place)) for place in range(total)),
        concurrency=concurrency,
        in_order=in_order,
        return_errors=True,
    )
    under_way: list[int] = []
    yielded: list[int] = []
    while True:
        under_way += [index for index, _ in gathering.to_send()]
        assert len(under_way) <= concurrency
        if gathering.is_over:
            break
        index = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        fails = data.draw(st.booleans())
        gathering.done(index, ComponentFailedError("died") if fails else result(index))
        while (one := gathering.next_outcome()) is not None:
            yielded.append(one.index if isinstance(one, GenerateResult) else one.detail["index"])
        assert len(gathering._held) <= 2 * concurrency
    assert sorted(yielded) == list(range(total))
    if in_order:
        assert yielded == sorted(yielded)
