"""Many requests at once, as the commands of many pictures run them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from diffuserve_client import (
    Client,
    ConnectionFailedError,
    DiffuserveError,
    GenerateRequest,
    NotFoundError,
    Retry,
)
from diffuserve_client._results import result_from
from diffuserve_client._studio.batch import progress_shown, run_batch
from unit.client.fake_triton import FakeTriton, image, picture


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def requests(count: int) -> list[GenerateRequest]:
    return [GenerateRequest(prompt="a", seed=seed, steps=4) for seed in range(count)]


def test_a_bar_is_shown_where_somebody_looks(client: Client, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    done: list[int] = []
    with progress_shown(3, "pictures") as on_event:
        assert on_event is not None
        batch = run_batch(
            client, requests(3), concurrency=3, on_done=lambda index, _: done.append(index), on_event=on_event
        )
        shown = terminal.getvalue()
    assert "3 pictures" in shown
    assert sorted(done) == [0, 1, 2]
    assert [one.index for one in batch.results] == [0, 1, 2]
    assert {one.progress_every for one in fake.requests} == {2}


class Losing:
    """A client whose server is lost after the first result."""

    is_closed = False

    def generate_many(self, requests: Sequence[GenerateRequest], **options: Any) -> Iterator[Any]:
        assert options["return_errors"]
        try:
            yield result_from(requests[1], [image(0, picture())], index=1)
            yield NotFoundError("no such LoRA", index=2)
            yield ConnectionFailedError("lost", index=0)
            yield result_from(requests[3], [image(0, picture())], index=3)
        finally:
            self.is_closed = True


def test_once_the_server_is_lost_the_rest_is_cancelled() -> None:
    client, kept = Losing(), []
    batch = run_batch(
        cast("Client", client), requests(5), concurrency=1, on_done=lambda index, result: kept.append((index, result))
    )
    assert [index for index, _ in kept] == [1]
    assert client.is_closed
    told = [one.message if isinstance(one, DiffuserveError) else "" for one in batch.outcomes]
    assert told == ["lost", "", "no such LoRA", "lost", "lost"]
    batch.raise_if_empty()


def test_nothing_is_shown_where_nobody_looks(client: Client, fake: FakeTriton) -> None:
    with progress_shown(1, "pictures") as on_event:
        assert on_event is None


def test_a_server_that_is_not_there_is_the_first_error() -> None:
    with Client("localhost:9", retry=Retry(retries=0)) as client:
        batch = run_batch(client, requests(3), concurrency=1, on_done=lambda *_: None)
    with pytest.raises(ConnectionFailedError):
        batch.raise_if_empty()
