"""Clients that ask for too much, never read, or die: others are served meanwhile, and what they took comes back."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, DeadlineError, DiffuserveError, GenerateRequest, QueueFullError, Retry, Timeout
from diffuserve_client._exchange import Exchange

SOON = 10.0  # seconds for a short request of high priority, whatever else goes on
PATIENT = Timeout(total=280, connect=30)


@pytest.fixture(scope="module")
def crowded(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("crowded") / "log"
    options = ServerOptions(deployment=deployment, http_port=0, grpc_port=0, metrics_port=0, log_file=log)
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url, timeout=PATIENT, retry=Retry(retries=0)) as client:
            client.generate("warm", steps=2, num_images=16)
        yield server


@pytest.fixture
def other(crowded: TritonServer) -> Iterator[Client]:
    """Somebody who just wants a picture."""
    with Client(
        crowded.grpc_url, timeout=Timeout(total=SOON, connect=SOON, stall=SOON), retry=Retry(retries=0)
    ) as client:
        yield client


def own_megabytes(server: TritonServer) -> dict[str, int]:
    """Memory of tritonserver and of the public model that is theirs alone, in MiB."""
    assert server.pid is not None
    found = {}
    for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
        command = process.cmdline()
        name = "diffusion" if "diffusion_0_0" in command else process.name()
        if name in ("diffusion", "tritonserver"):
            status = Path(f"/proc/{process.pid}/status").read_text()
            found[name] = int(status.split("RssAnon:")[1].split()[0]) // 1024
    return found


def status(server: TritonServer) -> dict[str, Any]:
    body = json.dumps({"prompt": "", "operation": "status"}).encode()
    with urllib.request.urlopen(f"{server.http_url}/v2/models/diffusion/generate", body, timeout=SOON) as answer:
        told: dict[str, Any] = json.loads(json.load(answer)["info"])
    return told


def until_idle(server: TritonServer, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while (told := status(server))["active"] or told["waiting"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


@contextmanager
def unread_streams(url: str, count: int, **parameters: Any) -> Iterator[list[Any]]:
    """Requests whose answers nobody reads, until the connection is closed."""
    with grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        requests = (GenerateRequest(prompt="a ring", seed=seed, **parameters) for seed in range(count))
        messages = (Exchange(request, url=url, timeout=Timeout()).message() for request in requests)
        calls = [stub.ModelStreamInfer(iter((message,))) for message in messages]
        yield calls  # which are cancelled when nobody holds them any more


def until_taken(server: TritonServer, requests: int) -> None:
    deadline = time.monotonic() + 60
    while (told := status(server))["active"] + told["waiting"] < requests:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def test_clients_that_never_read_hold_nobody_up(crowded: TritonServer, other: Client) -> None:
    before = own_megabytes(crowded)
    asked = {"num_images": 8, "steps": 150, "progress_every": 1, "preview_every": 1, "heartbeat_ms": 1000}
    with unread_streams(crowded.grpc_url, 16, **asked):
        until_taken(crowded, 16)
        for _ in range(20):
            assert other.generate("a circle", steps=5, priority=5).images
            assert status(crowded)["stalled_s"] < SOON
    until_idle(crowded)
    after = own_megabytes(crowded)
    print(f"{before} MiB before, {after} after")
    assert after["diffusion"] < before["diffusion"] + 100


OPEN_MANY = """
import sys, time
from acceptance.test_exhaustion import unread_streams
with unread_streams(sys.argv[1], 200, steps=150, progress_every=1) as streams:
    print(next(iter(streams[0])).infer_response.model_name, flush=True)
    time.sleep(300)
"""


def test_a_client_of_200_streams_that_dies_leaves_nothing(crowded: TritonServer, other: Client) -> None:
    before = own_megabytes(crowded)
    for _ in range(3):
        command = [sys.executable, "-c", OPEN_MANY, crowded.grpc_url]
        with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as dies:
            assert dies.stdout is not None
            assert dies.stdout.readline().strip() == "diffusion"
            until_taken(crowded, 200)
            assert other.generate("a circle", steps=5, priority=5).images
            dies.kill()
        until_idle(crowded, 30)
        assert other.generate("a circle", steps=5).images
    after = own_megabytes(crowded)
    print(f"{before} MiB before, {after} after")
    assert after["diffusion"] < before["diffusion"] + 100
    assert after["tritonserver"] < before["tritonserver"] + 100


def large_picture() -> bytes:
    """As many pixels as are taken, in noise that PNG makes half as small."""
    rng = np.random.default_rng(1)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (2048, 2048, 3), dtype=np.uint8), 2, 0), 2, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_sixteen_pictures_of_the_largest_size_are_borne_again_and_again(crowded: TritonServer, other: Client) -> None:
    data, waves = large_picture(), list[dict[str, int]]()
    with Client(crowded.grpc_url, timeout=PATIENT, retry=Retry(retries=0)) as greedy, ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            asked: dict[str, Any] = {"init_image": data, "steps": 4, "strength": 0.5}
            wave = [pool.submit(greedy.generate, "a ring", seed=seed, **asked) for seed in range(16)]
            until_taken(crowded, 1)
            assert other.generate("a circle", steps=5, priority=5).images
            assert status(crowded)["stalled_s"] < SOON
            assert all(one.result().images for one in wave)
            waves.append(own_megabytes(crowded))
    print(f"{len(data) / 2**20:.1f} MiB a picture; MiB after each wave: {waves}")
    assert waves[-1]["diffusion"] < waves[1]["diffusion"] + 100
    assert waves[-1]["tritonserver"] < waves[1]["tritonserver"] + 100


def test_a_full_server_refuses_at_once_and_recovers(crowded: TritonServer, other: Client) -> None:
    with unread_streams(crowded.grpc_url, 16, num_images=16, steps=150):
        until_taken(crowded, 16)
        seconds = []
        for _ in range(100):
            began = time.monotonic()
            with pytest.raises(QueueFullError, match="256 images are in the server"):
                other.generate("one more", steps=1)
            seconds.append(time.monotonic() - began)
    print(f"refused in {1000 * sorted(seconds)[50]:.0f} ms, {1000 * max(seconds):.0f} at most")
    until_idle(crowded, 30)
    assert other.generate("one more", steps=1).images


def test_a_storm_of_deadlines_that_cannot_be_met_disturbs_nobody(crowded: TritonServer, other: Client) -> None:
    over = threading.Event()

    def steadily() -> list[float]:
        seconds = []
        while not over.is_set():
            began = time.monotonic()
            assert other.generate("steady", steps=5, priority=1).images
            seconds.append(time.monotonic() - began)
        return seconds

    with Client(crowded.grpc_url, timeout=PATIENT, retry=Retry(retries=0)) as stormy, ThreadPoolExecutor(65) as pool:

        def ask(number: int) -> str:
            try:
                stormy.generate("too late", steps=100, deadline_ms=1 + number % 700)
            except DiffuserveError as error:
                return type(error).__name__
            return "done"

        steady = pool.submit(steadily)
        ends = Counter(pool.map(ask, range(2000)))
        over.set()
        seconds = steady.result()
    print(f"{dict(ends)}; {len(seconds)} others, {max(seconds):.2f} s at most")
    assert set(ends) <= {"done", DeadlineError.__name__}
    until_idle(crowded)
