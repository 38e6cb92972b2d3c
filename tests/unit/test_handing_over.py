"""Draining, snapshots that another service goes on from, heartbeats: over fake components."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.errors import DrainingError, InvalidArgumentError
from diffuserve.manifest import Conditioning, Deployment
from diffuserve.request import Event, GenerateRequest
from diffuserve.service import DiffusionService
from diffuserve.spec import SAMPLE_INPAINT
from unit.fakes import FakeModels, Recorder, write_deployment
from unit.pictures import encoded, mask, picture

PICTURE, MASK = encoded(picture()), encoded(mask())
KEY = b"the fleet's key"
Start = Callable[..., tuple[DiffusionService, FakeModels]]


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return write_deployment(tmp_path / "one", "fake")


@pytest.fixture
def start(deployment: Deployment) -> Iterator[Start]:
    services = []

    def start(where: Deployment = deployment, key: bytes = KEY) -> tuple[DiffusionService, FakeModels]:
        models = FakeModels()
        # Fakes cost nothing, so no count of rows is better than another.
        policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
        services.append(DiffusionService(where, models.runner(), policy=policy, key=key))
        return services[-1], models

    yield start
    for service in services:
        service.close()


def ask(service: DiffusionService, **values: Any) -> Recorder:
    reply = Recorder()
    service.submit(GenerateRequest(**{"prompt": "a ring", "seed": 1, "steps": 6, "sampler": "ddim", **values}), reply)
    return reply


def go_on(service: DiffusionService, snapshot: bytes, **values: Any) -> Recorder:
    reply = Recorder()
    service.submit(GenerateRequest(prompt="", resume=snapshot, **values), reply)
    reply.wait()
    return reply


def pictures(events: Sequence[Event]) -> dict[int, bytes]:
    assert {event.kind for event in events} == {"image"}
    return {event.index: event.data for event in events}


def drained_at(service: DiffusionService, models: FakeModels, call: int, **values: Any) -> Recorder:
    """A request whose server begins to drain, with no grace, while that UNet call is under way."""
    reached, drained = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == call:
            reached.set()
            while not service.loop._suspending:
                time.sleep(0.001)

    models.before_unet = hold
    reply = ask(service, **values)
    assert reached.wait(20)

    def drain() -> None:
        service.drain(0.0)
        drained.set()

    threading.Thread(target=drain).start()
    reply.wait()
    assert drained.wait(20)
    return reply


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "heun", "lms", "pndm"])
@pytest.mark.parametrize("call", [1, 4])
def test_the_picture_is_the_same_when_another_server_goes_on(start: Start, sampler: str, call: int) -> None:
    whole = ask(start()[0], sampler=sampler).wait().events[0]
    reply = drained_at(*start(), call, sampler=sampler)
    (event,) = reply.events
    assert (event.kind, event.info["images"]) == ("snapshot", [0])
    other, models = start()
    again = go_on(other, event.data).events[0]
    assert again.data == whole.data
    assert again.info["seed"] == whole.info["seed"]
    assert again.info.get("resumed_at_step", 0) == event.step
    assert len(models.rows) < 1 + 2 * 6


def test_previews_go_on_where_they_are_asked_for_again(start: Start) -> None:
    whole = ask(start()[0], sampler="heun").wait().events[0]
    (left,) = drained_at(*start(), 5, sampler="heun").events
    service, models = start()
    seen, reply = threading.Event(), Recorder()
    reply.on_event = lambda event: seen.set() if event.kind == "preview" else None
    models.before_decode = lambda: None if seen.wait(20) else pytest.fail("no preview came")
    service.submit(GenerateRequest(prompt="", resume=left.data, preview_every=1), reply)
    *previews, image = reply.wait().events
    assert image.data == whole.data
    assert {event.kind for event in previews} == {"preview"}
    assert all(left.step < event.step <= 6 for event in previews)


def put_embedding(deployment: Deployment, value: float) -> None:
    deployment.embeddings.mkdir(exist_ok=True)
    save_file({"emb_params": torch.full((2, 1), value)}, deployment.embeddings / "ring.safetensors")


def test_long_and_learnt_prompts_are_read_again_where_it_goes_on(start: Start, deployment: Deployment) -> None:
    put_embedding(deployment, 0.5)
    values: dict[str, Any] = {"prompt": "(a ring:1.2), " * 40, "prompt_syntax": "a1111", "clip_skip": 1}
    whole = ask(start()[0], **values).wait().events[0]
    data = drained_at(*start(), 3, **values).events[0].data
    again = go_on(start()[0], data).events[0]
    assert again.data == whole.data
    asked = ("prompt_chunks", "embeddings", "clip_skip", "prompt_syntax")
    assert [again.info[name] for name in asked] == [whole.info[name] for name in asked]
    put_embedding(deployment, 0.25)
    with pytest.raises(
        InvalidArgumentError, match=r"read with the embeddings ring:\w{16}, and here with ring:\w{16}; give"
    ):
        go_on(start()[0], data)
    (deployment.embeddings / "ring.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"and here with none; give servers that hand over"):
        go_on(start()[0], data)


def test_it_can_be_handed_over_again_and_again(start: Start) -> None:
    whole = ask(start()[0], sampler="dpmpp_2m_sde").wait().events[0]
    data = drained_at(*start(), 2, sampler="dpmpp_2m_sde").events[0].data
    for _ in range(3):
        service, models = start()
        moved = threading.Event()

        def hold(number: int, service: DiffusionService = service, moved: threading.Event = moved) -> None:
            if number == 1:
                moved.set()
                while not service.loop._suspending:
                    time.sleep(0.001)

        models.before_unet = hold
        reply = Recorder()
        service.submit(GenerateRequest(prompt="", resume=data), reply)
        assert moved.wait(20)
        service.drain(0.0)
        data = reply.wait().events[0].data
    assert go_on(start()[0], data).events[0].data == whole.data


def test_pictures_that_are_done_come_and_the_others_are_in_the_snapshot(start: Start) -> None:
    whole = ask(start()[0], num_images=3).wait().events
    service, models = start()
    # One row cap of 2 steps the images one after the other.
    service._policy.max_rows = lambda group: 2
    reply = drained_at(service, models, 8, num_images=3)
    assert [event.kind for event in reply.events] == ["image", "snapshot"]
    assert reply.events[-1].info["images"] == [1, 2]
    assert reply.finals == 1
    rest = go_on(start()[0], reply.events[-1].data).events
    assert pictures([reply.events[0], *rest]) == pictures(whole)


def test_a_request_that_was_not_begun_is_handed_over_whole(start: Start) -> None:
    whole = ask(start()[0], num_images=2).wait().events
    service, models = start()
    held, release = threading.Event(), threading.Event()
    text = models.text

    def slow_text(inputs: Any) -> Any:
        held.set()
        assert release.wait(20)
        return text(inputs)

    service.loop._runner._models["text_encoder"] = slow_text  # type: ignore[attr-defined]
    first = ask(service, num_images=2)
    assert held.wait(20)
    waiting = ask(service, num_images=2)
    drain = threading.Thread(target=service.drain, args=(0.0,))
    drain.start()
    (event,) = waiting.wait().events
    release.set()
    first.wait()
    drain.join(20)
    for reply in (first, waiting):
        assert pictures(go_on(start()[0], reply.events[0].data).events) == pictures(whole)
    assert event.step == 0


@pytest.fixture
def told(tmp_path: Path) -> Deployment:
    return write_deployment(tmp_path / "told", "fake", conditioning=Conditioning(sample=SAMPLE_INPAINT))


@pytest.mark.parametrize(("strength", "call"), [(0.7, 1), (1.0, 3)])
@pytest.mark.parametrize("kind", ["put back", "told"])
def test_with_a_mask_it_is_the_same_too(
    start: Start, deployment: Deployment, told: Deployment, kind: str, strength: float, call: int
) -> None:
    where = deployment if kind == "put back" else told
    values: Any = {"init_image": PICTURE, "mask_image": MASK, "strength": strength, "sampler": "euler_ancestral"}
    whole = ask(start(where)[0], **values).wait().events[0]
    (event,) = drained_at(*start(where), call, **values).events
    assert event.kind == "snapshot"
    again = go_on(start(where)[0], event.data).events[0]
    assert again.data == whole.data
    assert again.info["strength"] == strength


@pytest.mark.parametrize("values", [{}, {"mask_image": MASK}])
def test_a_picture_that_was_not_begun_is_handed_over(
    start: Start, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"init_image": PICTURE, "strength": 0.5, "num_images": 2, **values}
    whole = ask(start()[0], **values).wait().events
    service, _ = start()
    monkeypatch.setattr(service, "_prepare_waiting", lambda: None)  # it never comes to it
    waiting = ask(service, **values)
    service.drain(0.0)
    (event,) = waiting.wait().events
    assert (event.kind, event.step) == ("snapshot", 0)
    again = go_on(start()[0], event.data).events
    assert {one.index: one.data for one in again} == {one.index: one.data for one in whole}


def test_a_server_that_drains_takes_nothing_and_finishes_what_it_can(start: Start) -> None:
    service, models = start()
    reached, release = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 1:
            reached.set()
            assert release.wait(20)

    models.before_unet = hold
    reply = ask(service)
    assert reached.wait(20)
    drain = threading.Thread(target=service.drain, args=(20.0,))
    drain.start()
    while service.status()["state"] == "serving":
        time.sleep(0.001)
    with pytest.raises(DrainingError, match="send it to another one"):
        ask(service)
    status = service.status()
    assert (status["state"], status["waiting"], status["active"]) == ("draining", 0, 1)
    release.set()
    drain.join(20)
    assert not drain.is_alive()
    assert [event.kind for event in reply.events] == ["image"]
    assert {"state": "draining", "waiting": 0, "active": 0}.items() <= service.status().items()


@pytest.mark.parametrize("model", ["text_encoder", "unet", "vae_decoder"])
def test_whichever_engine_stands_still_the_status_tells(start: Start, model: str) -> None:
    service, _ = start()
    held, release = threading.Event(), threading.Event()
    runner = service._checkpoints["fake"]._runner
    answer = runner._models[model]  # type: ignore[attr-defined]

    def hold(inputs: Any) -> Any:
        held.set()
        assert release.wait(20)
        return answer(inputs)

    assert service.status()["stalled_s"] == 0
    runner._models[model] = hold  # type: ignore[attr-defined]
    reply = ask(service)
    assert held.wait(20)
    began = time.monotonic()
    while (stalled := float(str(service.status()["stalled_s"]))) < 0.05:
        assert time.monotonic() - began < 10
    assert stalled < 10
    release.set()
    reply.wait()
    while service.status()["stalled_s"]:
        assert time.monotonic() - began < 10


def test_base64_comes_and_goes(start: Start) -> None:
    whole = ask(start()[0]).wait().events[0]
    data = drained_at(*start(), 3, image_encoding="base64").events[0].data
    again = go_on(start()[0], data, image_encoding="base64").events[0]
    assert base64.b64decode(again.data) == whole.data


def test_how_it_is_answered_is_the_new_requests(start: Start) -> None:
    reply = drained_at(*start(), 3, progress_every=1, client_tag="one")
    assert [event.kind for event in reply.events] == ["queued", "progress", "progress", "progress", "snapshot"]
    again = go_on(start()[0], reply.events[-1].data, progress_every=2, client_tag="two")
    assert [(event.kind, event.step) for event in again.events] == [("queued", 0), ("progress", 4), ("image", 6)]
    assert again.events[-1].info["client_tag"] == "two"


def test_what_the_snapshot_holds_is_not_said_again() -> None:
    with pytest.raises(InvalidArgumentError, match="steps is given beside resume, and the snapshot holds it"):
        GenerateRequest(prompt="", resume=b"x", steps=3)
    with pytest.raises(InvalidArgumentError, match="prompt is given beside resume"):
        GenerateRequest(prompt="a ring", resume=b"x")


def test_other_weights_other_keys_and_other_checkpoints_are_refused(start: Start, tmp_path: Path) -> None:
    data = drained_at(*start(), 3).events[0].data
    service, _ = start(write_deployment(tmp_path / "two", "fake", key="1"))
    with pytest.raises(InvalidArgumentError, match="another export of fake"):
        go_on(service, data)
    service, _ = start(key=b"another")
    with pytest.raises(InvalidArgumentError, match="another key"):
        go_on(service, data)
    service, _ = start(write_deployment(tmp_path / "three", "other"))
    with pytest.raises(Exception, match="'fake' is not deployed"):
        go_on(service, data)
    service, _ = start(write_deployment(tmp_path / "four", "fake", latent_channels=8))
    with pytest.raises(InvalidArgumentError, match=r"latents have the shape \[4, 8, 8\], and fake has \[8, 8, 8\]"):
        go_on(service, data)


def test_heartbeats_come_while_nothing_else_does(start: Start) -> None:
    service, models = start()
    beats, release = threading.Event(), threading.Event()

    def hold(call: int) -> None:
        if call == 1:
            assert release.wait(20)

    models.before_unet = hold
    reply, silent = Recorder(), Recorder()
    reply.on_event = lambda event: beats.set() if len(reply.events) == 2 else None
    service.submit(replace(GenerateRequest(prompt="a", steps=2), heartbeat_ms=1000), reply)
    service.submit(GenerateRequest(prompt="a", steps=2), silent)
    assert beats.wait(20)
    release.set()
    reply.wait()
    assert [event.kind for event in reply.events[:2]] == ["heartbeat", "heartbeat"]
    assert reply.events[-1].kind == "image"
    assert [event.kind for event in silent.wait().events] == ["image"]
    with pytest.raises(InvalidArgumentError, match="heartbeat_ms is 10, and must be from 1000"):
        GenerateRequest(prompt="a", heartbeat_ms=10)
