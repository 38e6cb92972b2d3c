"""Snapshots of a real server, taken after every step, that a second real server goes on from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffuserve.request import Event
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.server.snapshot_key import with_snapshot_key
from diffuserve_client import Client, GenerateRequest, Retry
from unit.pictures import encoded, mask, picture

STEPS = 20
PICTURE, MASK = encoded(picture()), encoded(mask())
SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m", "lms", "heun")


@pytest.fixture
def drained(deployment: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server that one test may drain."""
    options = ServerOptions(deployment=deployment, http_port=0, grpc_port=0, metrics_port=0, log_file=tmp_path / "log")
    with TritonServer(with_snapshot_key(options)) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize("step", range(STEPS))
def test_drained_at_any_step_it_goes_on_to_the_same_picture(drained: TritonServer, client: Client, step: int) -> None:
    """Requests of each sampler; the drain begins when the slowest of them has so many steps behind it."""
    plain = [
        GenerateRequest(prompt="a ring", steps=STEPS, seed=step, sampler=name, progress_every=1) for name in SAMPLERS
    ]
    masked = [replace(one, init_image=PICTURE, mask_image=MASK, strength=1.0) for one in plain[::2]]
    requests = [*plain, *masked]
    reached, ends = threading.Semaphore(0), dict[GenerateRequest, Event]()

    def follow(request: GenerateRequest, theirs: Client) -> None:
        with closing(theirs.stream(request)) as events:
            for event in events:
                if event.kind in ("queued", "progress") and event.step == step:
                    reached.release()
                ends[request] = event

    with Client(drained.grpc_url, retry=Retry(retries=0)) as theirs:
        threads = [threading.Thread(target=follow, args=(request, theirs)) for request in requests]
        for thread in threads:
            thread.start()
        for _ in requests:
            assert reached.acquire(timeout=60)
        assert drained.drain(0.0) is not None
        for thread in threads:
            thread.join(60)
    kinds = [ends[request].kind for request in requests]
    assert "snapshot" in kinds or step > STEPS - 3, kinds
    for request in requests:
        end = ends[request]
        if end.kind == "snapshot":
            again = client.resume(end.data)
            whole = client.generate(replace(request, progress_every=0))
            difference = np.abs(np.asarray(again.image).astype(int) - np.asarray(whole.image)).max()
            name = f"{request.sampler}{' with a mask' if request.mask_image else ''}"
            print(f"{name} at step {end.step}: {difference}/255 from the whole")
            assert difference <= 1, (name, end.step)


def test_two_servers_hand_one_request_to_and_fro(deployment: Path, client: Client, tmp_path: Path) -> None:
    # Large ones, so that none is done before the drain is heard.
    request = GenerateRequest(
        prompt="a ring",
        steps=150,
        seed=1,
        sampler="dpmpp_2m_sde",
        progress_every=1,
        width=128,
        height=128,
        num_images=4,
    )
    whole = client.generate(replace(request, progress_every=0))
    for move in range(3):
        options = ServerOptions(
            deployment=deployment, http_port=0, grpc_port=0, metrics_port=0, log_file=tmp_path / str(move)
        )
        with ExitStack() as stack:
            server = stack.enter_context(TritonServer(with_snapshot_key(options)))
            server.wait_ready()
            events = stack.enter_context(Client(server.grpc_url, retry=Retry(retries=0))).stream(request)
            next(event for event in events if event.kind == "progress" and event.step >= 30 * (move + 1))
            threading.Thread(target=server.drain, args=(0.0,)).start()
            *_, last = events
        assert last.kind == "snapshot"
        request = GenerateRequest(prompt="", resume=last.data, progress_every=1)
    again = client.resume(request.resume)
    for one, other in zip(again.images, whole.images, strict=True):
        assert one.info["resumed_at_step"] >= 80
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image)).max() <= 1
