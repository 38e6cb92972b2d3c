"""Four checkpoints on one real Triton: shares of the time, brief requests beside long ones, a day of traffic."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import Deployment
from diffuserve.residency import Limits
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.sharing import SharingOptions, models_of
from diffuserve_client import Client
from integration.sharing import NAMES, are_alike, asked, calls, pictures, resident, several_checkpoints

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


@pytest.fixture(scope="module")
def several(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return several_checkpoints(deployment, tmp_path_factory.mktemp("several"))


@contextmanager
def serving(several: Deployment, folder: Path, sharing: SharingOptions) -> Iterator[tuple[TritonServer, Client, Path]]:
    """A server, a client, and the log of the server's component calls."""
    log = folder / "calls.jsonl"
    options = ServerOptions(
        deployment=several.root,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=folder / "triton.log",
        sharing=sharing,
        environment={"DIFFUSERVE_CALL_LOG": str(log)},
    )
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            yield server, client, log


def engine_seconds(lines: list[dict[str, Any]], since: float, until: float) -> dict[str, float]:
    seconds = dict.fromkeys(NAMES, 0.0)
    for one in lines:
        name, _, component = one["model"].partition("_")
        if component == "unet" and since <= one["started"] < until:
            seconds[name] += one["seconds"]
    return seconds


def test_busy_checkpoints_get_their_weights_of_the_engines_time(several: Deployment, tmp_path: Path) -> None:
    with serving(several, tmp_path, SharingOptions(weights=WEIGHTS)) as (_, client, log):
        ended = threading.Event()

        def keep_busy(name: str, seed: int) -> None:
            while not ended.is_set():
                client.generate(asked(name, seed, steps=25))

        with ThreadPoolExecutor(16) as threads:
            running = [threads.submit(keep_busy, name, seed) for name in NAMES for seed in range(4)]
            time.sleep(20)  # all have joined, and what calls cost is known
            since = time.monotonic()
            time.sleep(90)
            until = time.monotonic()
            ended.set()
            for one in running:
                one.result()
        seconds = engine_seconds(calls(log), since, until)
    total = sum(seconds.values())
    shares = {name: round(seconds[name] / total, 4) for name in NAMES}
    print(f"\nof {total:.1f} s in {until - since:.1f} s: {shares}")
    for name, weight in WEIGHTS.items():
        assert shares[name] == pytest.approx(weight / 10, rel=0.05)


def test_a_brief_request_waits_for_two_calls_of_a_long_batch_at_most(several: Deployment, tmp_path: Path) -> None:
    """The call under way when its latents are ready, and one more before its own last step."""
    with serving(several, tmp_path, SharingOptions()) as (server, client, log), ThreadPoolExecutor(8) as threads:
        for name in "ab":
            client.generate(asked(name))
        waited, between = join_wait(server), list[int]()
        for attempt in range(8):
            long = [threads.submit(client.generate, asked("b", seed, steps=50)) for seed in range(6)]
            time.sleep(0.5 + 0.05 * attempt)
            sent = time.monotonic()
            client.generate(asked("a", attempt))
            assert any(not one.done() for one in long), "it had no company"
            lines = [one for one in calls(log) if one["started"] > sent]
            brief = [one["started"] for one in lines if one["model"] == "a_unet"]
            between.append(sum(brief[0] < one["started"] < brief[3] for one in lines if one["model"] == "b_unet"))
            for one in long:
                one.result()
        longest = max(one["seconds"] for one in calls(log) if one["model"] == "b_unet")
        waited = (join_wait(server) - waited) / len(between)
    print(
        f"\ncalls of the other checkpoint between the first and the last of 4 steps: {between}; the first waited for "
        f"{1000 * waited:.0f} ms beyond the call under way; the longest of the other took {1000 * longest:.0f} ms"
    )
    assert max(between) <= 1
    assert waited <= longest


def join_wait(server: TritonServer) -> float:
    """Seconds that images of `a` waited for their first call, all together."""
    time.sleep(1.2)  # two flushes
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    name = 'diffuserve_join_wait_seconds_sum{checkpoint="a"} '
    return float(next(line.removeprefix(name) for line in text.splitlines() if line.startswith(name)))


def test_a_day_of_traffic_with_room_for_two(several: Deployment, tmp_path: Path) -> None:
    """A day in three minutes: a favourite that changes, quiet times, requests with few and many steps."""
    models = models_of(several)
    budget = sum({**models["a"], **models["b"]}.values())
    sharing = SharingOptions(Limits(budget=budget, idle=10.0, stay=2.0, loads=20))
    dice = random.Random(20)
    kinds = [asked(name, seed, steps=steps) for name in NAMES for seed in (1, 2) for steps in (2, 12)]
    expected = dict(zip(kinds, pictures(several, kinds), strict=True))
    most, samples = 0, 0
    with serving(several, tmp_path, sharing) as (_, client, _), ThreadPoolExecutor(32) as threads:
        began, made, ended = time.monotonic(), list[tuple[Any, Any]](), threading.Event()

        def sample() -> None:
            nonlocal most, samples
            while not ended.wait(0.1):
                status = client.status()
                most, samples = max(most, status["resident_bytes"]), samples + 1
                assert len(resident(status)) <= 2

        watching = threads.submit(sample)
        for hour in range(24):
            favourite, quiet = NAMES[hour // 6], hour in (3, 4, 16)
            until = began + (hour + 1) * 7.5
            while time.monotonic() < until:
                time.sleep(dice.expovariate(0.05 if quiet else 1.2))
                name = favourite if dice.random() < 0.7 else dice.choice(NAMES)
                request = dice.choice([one for one in kinds if one.checkpoint == name])
                made.append((request, threads.submit(client.generate, request)))
        for request, one in made:
            assert are_alike(one.result().images[0].data, expected[request])
        seconds = time.monotonic() - began
        ended.set()
        watching.result()
        told = client.status()["checkpoints"]
        loads = sum(one["loads"] for one in told.values())
    waited = [one.result().images[0].info.get("load_s", 0.0) for _, one in made]
    print(
        f"\n{len(made)} requests in {seconds:.0f} s, {loads} loads; {sum(map(bool, waited))} waited for one, "
        f"{max(waited):.1f} s at most; {most / 1e6:.0f} of {budget / 1e6:.0f} MB in {samples} samples"
    )
    assert samples > 100
    assert most <= budget
    assert loads <= 20 * (seconds / 60 + 1)


def test_loads_that_fail_do_no_harm_to_the_rest(deployment: Path, tmp_path: Path) -> None:
    """Eight of them, while other checkpoints come and go. Not asked for over HTTP, the third ended the server."""
    folder = tmp_path / "spoiled"
    several = several_checkpoints(deployment, folder, spoiled="spoiled")
    models = models_of(several)
    sharing = SharingOptions(
        Limits(budget=sum({**models["a"], **models["b"]}.values()), idle=4.0, stay=0.3, loads=1000)
    )
    expected = dict(zip(NAMES, pictures(several, [asked(name) for name in NAMES]), strict=True))
    over, right = threading.Event(), list[bool]()

    def traffic(client: Client, rng: random.Random) -> None:
        while not over.is_set():
            name = rng.choice(NAMES)
            right.append(are_alike(client.generate(asked(name)).images[0].data, expected[name]))

    with serving(several, tmp_path, sharing) as (_, client, _), ThreadPoolExecutor(4) as pool:
        others = [pool.submit(traffic, client, random.Random(seed)) for seed in range(4)]
        try:
            for _ in range(8):
                with pytest.raises(ComponentFailedError, match=r"spoiled cannot be loaded: .*cannot load model\.onnx"):
                    client.generate(asked("spoiled"))
                # For a moment after a load that failed, nothing is tried.
                assert not over.wait(sharing.limits.retry + 0.1)
        finally:
            over.set()
        for one in others:
            one.result()
    assert right
    assert all(right)
    print(f"8 loads failed, {len(right)} pictures beside them were right")
