"""A real Triton whose memory holds two of four checkpoints: all are served, the budget holds, idle ones leave."""

from __future__ import annotations

import random
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import Deployment
from diffuserve.residency import Limits
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.server.probe import Probe
from diffuserve.sharing import SharingOptions, models_of
from diffuserve.spec import UNET
from diffuserve_client import Client, Retry
from integration.sharing import (
    NAMES,
    are_alike,
    asked,
    instances_of,
    pictures,
    resident,
    several_checkpoints,
    stubs_bytes,
)

IDLE = 4.0


@pytest.fixture(scope="module")
def several(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return several_checkpoints(deployment, tmp_path_factory.mktemp("several"), broken="broken", spoiled="spoiled")


@pytest.fixture(scope="module")
def server(several: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    models = models_of(several)
    budget = sum({**models["a"], **models["b"]}.values())
    sharing = SharingOptions(Limits(budget=budget, idle=IDLE, stay=0.5, loads=40, retry=2.0))
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    options = ServerOptions(
        deployment=several.root, http_port=0, grpc_port=0, metrics_port=0, log_file=log, sharing=sharing
    )
    with TritonServer(options) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, retry=Retry(retries=0)) as client:
        yield client


def counted(server: TritonServer, model: str) -> int:
    """The calls of a model, by Triton's metrics."""
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    sought = f'nv_inference_exec_count{{model="{model}",version="1"}} '
    return sum(int(float(line.removeprefix(sought))) for line in lines if line.startswith(sought))


def test_more_checkpoints_than_fit_are_all_served_within_the_budget(several: Deployment, client: Client) -> None:
    order = [*NAMES, *random.Random(5).choices(NAMES, k=8)]
    expected = dict(zip(NAMES, pictures(several, [asked(name) for name in NAMES]), strict=True))
    assert all((expected["a"] != expected[name]).any() for name in NAMES[1:]), "each makes a picture of its own"
    with ThreadPoolExecutor(6) as threads:
        made = [threads.submit(client.generate, asked(name)) for name in order]
        while not all(one.done() for one in made):
            status = client.status()
            assert status["resident_bytes"] <= status["memory_budget"]
            assert len(resident(status)) <= 2
            time.sleep(0.05)
    for name, one in zip(order, made, strict=True):
        assert are_alike(one.result().images[0].data, expected[name])
    waited = [one.result().images[0].info.get("load_s", 0.0) for one in made]
    assert any(waited)
    loads = sum(one["loads"] for one in client.status()["checkpoints"].values())
    assert 2 <= loads <= len(order)


def test_what_checkpoints_share_is_in_memory_once(several: Deployment, server: TritonServer, client: Client) -> None:
    """By Triton's own list, its processes and its counts."""
    components = several.manifest("a").components
    shared = {one.model for name, one in components.items() if name != UNET}
    before = counted(server, components["vae_decoder"].model)
    for name in ("a", "b"):
        client.generate(asked(name, steps=1))
    assert resident(client.status()) == {"a", "b"}
    states = Probe(server.http_url).model_states() or {}
    assert {name for name, (state, _) in states.items() if state == "READY"} == {
        *shared,
        "a_unet",
        "b_unet",
        "diffusion",
    }
    instances = [one.rpartition("_0_0")[0] for one in instances_of(server.pid or 0)]
    assert sorted(instances) == sorted([*shared, "a_unet", "b_unet", "diffusion"])
    assert counted(server, components["vae_decoder"].model) == before + 2, "it decoded the pictures of both"


@pytest.mark.parametrize(("name", "reason"), [("broken", "not whole"), ("spoiled", "cannot load model.onnx")])
def test_a_checkpoint_that_cannot_be_loaded_is_refused_and_the_others_are_served(
    client: Client, name: str, reason: str
) -> None:
    with pytest.raises(ComponentFailedError, match=rf"{name} cannot be loaded: {name}_unet: .*{reason}"):
        client.generate(asked(name))
    told = client.status()["checkpoints"][name]
    assert not told["resident"]
    assert "cannot be loaded" in told["error"]
    assert client.generate(asked("a")).images


def test_an_idle_server_gives_its_memory_back_and_the_next_request_waits(
    several: Deployment, server: TritonServer, client: Client
) -> None:
    (expected,) = pictures(several, [asked("b")])
    client.generate(asked("b"))
    before = stubs_bytes(server.pid or 0)
    deadline = time.monotonic() + 120
    while (status := client.status())["resident_bytes"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not resident(status)
    assert stubs_bytes(server.pid or 0) < before - 100e6
    events: list[Any] = list(client.stream(asked("b", progress_every=1)))
    assert (events[0].kind, events[-1].kind) == ("queued", "image")
    assert are_alike(events[-1].data, expected)
    assert events[0].info["eta_ms"] > 100, "it says that it has to be loaded"
    assert 0.1 < events[-1].info["load_s"] <= events[-1].info["queued_s"]


def test_metrics_tell_of_what_came_and_went(server: TritonServer, client: Client) -> None:
    told = client.status()["checkpoints"]
    time.sleep(1.2)  # two flushes
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("diffuserve_")]
    samples = {name: float(value) for name, _, value in lines}
    for name in NAMES:
        label = f'{{checkpoint="{name}"}}'
        assert samples[f"diffuserve_loads_total{label}"] == told[name]["loads"]
        assert samples[f"diffuserve_unloads_total{label}"] == told[name]["unloads"]
        assert samples[f"diffuserve_load_seconds_count{label}"] == told[name]["loads"]
        assert (samples[f"diffuserve_resident_bytes{label}"] > 0) == told[name]["resident"]
    assert samples['diffuserve_loads_failed_total{checkpoint="broken"}'] >= 1
    assert 0 < samples["diffuserve_memory_bytes"] <= client.status()["memory_budget"]
