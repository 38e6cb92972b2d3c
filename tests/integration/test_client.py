"""Every method of both clients against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from blocking import Blocking
from diffuserve import __version__
from diffuserve.server import TritonServer
from diffuserve_client import (
    CancelledError,
    Client,
    ConnectionFailedError,
    GenerateRequest,
    ImageEvent,
    InvalidArgumentError,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    Retry,
    Timeout,
)

RED = GenerateRequest(prompt="a large red circle on a blue background", steps=8, seed=7)


@pytest.fixture(scope="module", params=[Client, Blocking], ids=["Client", "AsyncClient"])
def both(request: pytest.FixtureRequest, server: TritonServer) -> Iterator[Client]:
    with request.param(server.grpc_url, timeout=Timeout(total=60)) as client:
        yield client


def test_generate(both: Client) -> None:
    steps: list[int] = []
    previews: list[tuple[int, int]] = []
    result = both.generate(
        RED,
        on_progress=lambda event: steps.append(event.step),
        on_preview=lambda event: previews.append(event.image.size),
        request_id="mine",
    )
    assert steps == list(range(1, 8))
    assert previews
    assert result.request_id == "mine"
    assert result.image.size == (64, 64)
    assert result.images[0].data == both.generate(RED).images[0].data


def test_a_drawn_seed_makes_the_same_picture_again(both: Client) -> None:
    first = both.generate("a small green ring on a white background", steps=4, num_images=2)
    assert [one.seed for one in first.images] == [first.request.seed, first.request.seed + 1]
    again = both.generate(first.request)
    assert [one.data for one in again.images] == [one.data for one in first.images]


def test_stream(both: Client) -> None:
    request = GenerateRequest(prompt="a", steps=3, progress_every=1, preview_every=2, seed=1)
    kinds = [type(event) for event in both.stream(request)]
    assert kinds[0] is QueuedEvent
    assert kinds[-1] is ImageEvent
    assert kinds.count(ProgressEvent) == 2
    assert set(kinds) <= {QueuedEvent, ProgressEvent, PreviewEvent, ImageEvent}
    with closing(both.stream(request)) as events:
        queued = next(events)
    assert isinstance(queued, QueuedEvent)
    assert 0 < queued.eta_s < 60


def test_generate_many(both: Client) -> None:
    requests = [GenerateRequest(prompt="a ring", steps=2 + seed % 3, seed=seed) for seed in range(12)]
    in_order = list(both.generate_many(requests, concurrency=5))
    assert [one.request.seed for one in in_order] == list(range(12))
    as_done = list(both.generate_many(requests, concurrency=12, in_order=False))
    assert sorted(one.index for one in as_done) == list(range(12))
    assert {one.index: one.image.tobytes() for one in as_done} == {one.index: one.image.tobytes() for one in in_order}


def test_cancel(both: Client) -> None:
    def stop(_: Any) -> None:
        assert both_cancels("long")

    # Within the client's own thread or loop, where a call that waits would wait for itself.
    both_cancels = getattr(both, "client", both).cancel
    with pytest.raises(CancelledError):
        both.generate("a", steps=150, width=128, height=128, on_progress=stop, request_id="long")
    assert not both.cancel("long")


def test_resume_of_what_is_no_snapshot(both: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="snapshot"):
        both.resume(b"nothing of the kind")


def test_models_health_and_status(both: Client) -> None:
    (shapes,) = both.models()
    assert shapes.name == "shapes"
    assert "euler" in shapes.samplers
    assert shapes.limits["width"]["minimum"] <= 64 <= shapes.limits["width"]["maximum"]
    assert shapes.defaults["steps"] >= 1
    assert (shapes.resident, shapes.error) == (True, None)
    (health,) = both.health()
    assert (health.url, health.is_serving, health.version) == (both.urls[0], True, __version__)
    assert both.status()["state"] == "serving"


def test_the_http_port_is_not_the_grpc_port(both: Client, server: TritonServer) -> None:
    url = server.http_url.removeprefix("http://")
    with type(both)(url, retry=Retry(retries=0)) as wrong, pytest.raises(ConnectionFailedError, match="its gRPC port"):
        wrong.generate("a")
