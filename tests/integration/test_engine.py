"""The step engine on a real Triton: who joins when, who leaves when, who is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, DeadlineError, GenerateRequest, Retry

pytestmark = pytest.mark.alone


@dataclass
class Logged:
    """A server that writes down each engine call."""

    client: Client
    log: Path

    def unet_rows(self) -> list[int]:
        """The rows of each UNet call so far."""
        calls = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return [call["shapes"]["sample"][0] for call in calls if call["model"] == "shapes_unet"]


@pytest.fixture(scope="module")
def logged(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    folder = tmp_path_factory.mktemp("engine")
    options = ServerOptions(
        deployment=deployment,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=folder / "triton.log",
        environment={"DIFFUSERVE_CALL_LOG": str(folder / "calls.jsonl")},
    )
    with TritonServer(options) as server, Client(server.grpc_url, retry=Retry(retries=0)) as client:
        server.wait_ready()
        client.generate("warm up", steps=2)
        yield Logged(client, folder / "calls.jsonl")


class Background:
    """A request that runs beside the test, with an event for its first step."""

    def __init__(self, client: Client, prompt: str = "a circle", **values: Any) -> None:
        self.first_step, self.result = threading.Event(), dict[str, Any]()
        self._request = GenerateRequest(prompt=prompt, progress_every=1, **values)
        self._thread = threading.Thread(target=self._run, args=(client,))
        self._thread.start()

    def _run(self, client: Client) -> None:
        for event in client.stream(self._request):
            if event.kind == "progress":
                self.first_step.set()
            elif event.kind == "image":
                self.result = event.info

    def wait(self) -> Any:
        self._thread.join(60)
        assert self.result, "it ended without a picture"
        return self.result


def test_a_newcomer_is_in_the_first_call_after_its_text_encoding(logged: Logged) -> None:
    running = [Background(logged.client, steps=60, guidance_scale=1.0, seed=i) for i in range(8)]
    for one in running:
        assert one.first_step.wait(30)
    newcomer = Background(logged.client, "a text that was not encoded lately", steps=60, seed=99)
    info = newcomer.wait()
    for one in running:
        one.wait()
    calls = [json.loads(line) for line in logged.log.read_text(encoding="utf-8").splitlines()]
    texts = [call for call in calls if call["model"] == "shapes_text_encoder"]
    unets = [call for call in calls if call["model"] == "shapes_unet"]
    encoded = texts[-1]["started"] + texts[-1]["seconds"]
    # The call under way when its text was encoded may end, and one may have begun while its first latents were made.
    first = next(i for i, call in enumerate(unets) if call["shapes"]["sample"][0] == 10)
    begun_between = [call for call in unets[:first] if call["started"] > encoded]
    assert len(begun_between) <= 1
    assert info["joined_at_step"] > 1
    assert info["queued_s"] < 1


def test_cancelled_rows_are_gone_before_the_next_step(logged: Logged) -> None:
    stays = Background(logged.client, steps=100, guidance_scale=1.0)
    assert stays.first_step.wait(30)
    request = GenerateRequest(prompt="a ring", steps=150, guidance_scale=5.0, progress_every=1)
    with closing(logged.client.stream(request)) as events:
        next(event for event in events if event.kind == "progress" and event.step == 3)
        assert 3 in logged.unet_rows()[-2:]
    left_at = len(logged.unet_rows())
    stays.wait()
    after = logged.unet_rows()[left_at:]
    # The call under way, and what was called while the cancel travelled to the server.
    assert after.count(3) <= 6  # a call of these takes a few milliseconds
    assert after[7:]
    assert set(after[7:]) == {1}


def test_a_deadline_that_can_not_be_met_is_refused_at_once_while_the_server_is_full(logged: Logged) -> None:
    running = [Background(logged.client, steps=80, seed=i) for i in range(16)]
    for one in running:
        assert one.first_step.wait(60)
    waits = []
    for _ in range(5):
        started = time.perf_counter()
        with pytest.raises(DeadlineError, match="would be done in") as refused:
            logged.client.generate("a circle", steps=100, deadline_ms=50)
        waits.append(time.perf_counter() - started)
        assert refused.value.detail["eta_ms"] > 50
    # The client's own greeting and connection are in it; 50 ms are for the refusal.
    assert sorted(waits)[2] < 0.05, waits
    for one in running:
        one.wait()


def test_the_client_is_told_when_it_will_be_done(logged: Logged) -> None:
    events = list(logged.client.stream(GenerateRequest(prompt="a circle", steps=10, progress_every=5)))
    assert [event.kind for event in events] == ["queued", "progress", "image"]
    assert events[0].info["eta_ms"] == pytest.approx(1000 * events[-1].info["eta_s"], abs=1)
    assert 0 < events[0].info["eta_ms"] < 60_000
    assert events[0].info["images"] == 1
