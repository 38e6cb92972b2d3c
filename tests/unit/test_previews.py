"""Previews over fake components: what they show, when they come, and that nothing ever waits for them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.errors import InvalidArgumentError
from diffuserve.manifest import Component, TensorShape
from diffuserve.previews import Previews
from diffuserve.request import Event, GenerateRequest
from diffuserve.sampling import SAMPLERS
from diffuserve.service import DiffusionService
from diffuserve.spec import PREVIEW_DECODER
from unit.fakes import FakeModels, Recorder, component, write_deployment


@pytest.fixture
def models() -> FakeModels:
    return FakeModels()


def serve(root: Path, models: FakeModels, **values: Any) -> DiffusionService:
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    return DiffusionService(write_deployment(root, "fake", **values), models.runner(), policy=policy)


@pytest.fixture
def service(tmp_path: Path, models: FakeModels) -> Iterator[DiffusionService]:
    service = serve(tmp_path, models)
    yield service
    service.close()


def ask(service: DiffusionService, **values: Any) -> Recorder:
    reply = Recorder()
    asked = {"prompt": "a ring", "seed": 1, "steps": 6, "sampler": "ddim", "preview_every": 1, **values}
    service.submit(GenerateRequest(**asked), reply)
    return reply


class Paced:
    """Lets the next UNet call, and the picture, begin when every preview that was to come before has come."""

    def __init__(self, models: FakeModels, every: int = 1, evaluations: int = 1) -> None:
        self._seen, self._changed = 0, threading.Condition()
        self._every, self._evaluations = every, evaluations
        self._calls = 0
        models.before_unet = self._before_call
        models.before_decode = lambda: self._wait((self._calls // self._evaluations) // self._every)

    def on_event(self, event: Event) -> None:
        if event.kind == "preview":
            with self._changed:
                self._seen += 1
                self._changed.notify_all()

    def _before_call(self, call: int) -> None:
        self._wait(((call - 1) // self._evaluations) // self._every)
        self._calls = call

    def _wait(self, previews: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._seen >= previews, 20)


def paced(service: DiffusionService, models: FakeModels, every: int = 1, **values: Any) -> Recorder:
    reply, pace = Recorder(), Paced(models, every)
    models.rows.clear()
    reply.on_event = pace.on_event
    asked = {"prompt": "a ring", "seed": 1, "steps": 6, "sampler": "ddim", "preview_every": every, **values}
    service.submit(GenerateRequest(**asked), reply)
    reply.wait()
    models.before_unet, models.before_decode = lambda call: None, lambda: None
    return reply


def opened(event: Event) -> Any:
    data = event.data
    return Image.open(BytesIO(data))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_they_come_every_so_many_steps_and_before_the_picture(
    service: DiffusionService, models: FakeModels, every: int
) -> None:
    events = paced(service, models, every).events
    expected = [("preview", done) for done in range(every, 7, every)]
    assert [(event.kind, event.step) for event in events] == [*expected, ("image", 6)]
    assert {(event.index, event.steps, event.seed) for event in events} == {(0, 6, 1)}
    assert events[0].info == {"width": 8, "height": 8}
    assert opened(events[0]).size == (8, 8), "one pixel a latent"


def test_it_is_the_predicted_picture_by_the_manifests_colours(service: DiffusionService, models: FakeModels) -> None:
    """With the fakes' UNet and DDIM, x0 is what the paper says; the last one is what becomes the picture."""
    seen, latents = list[Any](), list[torch.Tensor]()
    unet = models.unet

    def watched(inputs: Any) -> Any:
        output = unet(inputs)["model_output"]
        told = service._checkpoints["fake"]._compile("ddim", 6)
        k = len(latents)
        alpha = float(_alphas()[int(told.timestep[k])])
        latents.append((inputs["sample"][0] - (1 - alpha) ** 0.5 * output[0]) / alpha**0.5)
        return {"model_output": output}

    models.unet = watched  # type: ignore[method-assign]
    service.loop._runner = models.runner()
    events = paced(service, models, guidance_scale=1.0).events
    for event, x0 in zip(events, latents, strict=False):
        seen.append(np.asarray(opened(event)).astype(int))
        expected = ((x0[:3] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(seen[-1] - expected).max() <= 1
    assert np.abs(seen[0] - seen[-1]).max() > 20, "it changes on the way"


def _alphas() -> Any:
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_the_same_to_the_bit_with_previews(
    service: DiffusionService, models: FakeModels, sampler: str
) -> None:
    without = ask(service, sampler=sampler, preview_every=0).wait().events
    with_previews = ask(service, sampler=sampler, preview_every=1).wait().events
    assert [event.kind for event in without] == ["image"]
    assert with_previews[-1].data == without[-1].data
    steps = [event.step for event in with_previews if event.kind == "preview"]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(1, 7))


@pytest.mark.parametrize(("image_format", "encoding"), [("png", "binary"), ("webp", "base64"), ("jpeg", "binary")])
def test_they_are_encoded_as_the_picture_is(
    service: DiffusionService, models: FakeModels, image_format: str, encoding: str
) -> None:
    events = paced(service, models, 3, image_format=image_format, image_encoding=encoding).events
    for event in events:
        data = base64.b64decode(event.data, validate=True) if encoding == "base64" else event.data
        assert Image.open(BytesIO(data)).format == image_format.upper()


def test_each_of_several_images_has_its_own(service: DiffusionService) -> None:
    events = ask(service, num_images=3, steps=12).wait().events
    for index in range(3):
        own = [event for event in events if event.index == index]
        steps = [event.step for event in own if event.kind == "preview"]
        assert [event.kind for event in own] == ["preview"] * len(steps) + ["image"]
        assert steps == sorted(set(steps))


def test_a_preview_that_takes_long_delays_nothing_and_is_never_late(
    service: DiffusionService, models: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first preview is held until all pictures are there; then there is at most one more of each image to make."""
    begun, release, made = threading.Event(), threading.Event(), list[int]()
    checkpoint = service._checkpoints["fake"]
    preview = checkpoint.preview

    def slow(latents: torch.Tensor, **values: Any) -> Image.Image:
        made.append(1)
        begun.set()
        assert release.wait(20)
        return preview(latents, **values)

    monkeypatch.setattr(checkpoint, "preview", slow)
    slow_one = ask(service, steps=50)
    assert begun.wait(20)
    others = [ask(service, steps=50, seed=seed, num_images=2) for seed in (3, 7)]
    for reply in (slow_one, *others):
        reply.wait()
        assert {event.kind for event in reply.events} == {"image"}
    assert len(service._pictures._previews._waiting) <= 5, "of each image at most one waits"
    release.set()
    service.close()
    assert len(made) == 1, "previews of pictures that are done are not made"
    assert len(slow_one.events) == 1, "nothing comes after the picture"


def test_a_newer_one_takes_the_place_of_one_that_waits() -> None:
    previews, held, made = Previews(), threading.Event(), list[str]()
    begun = threading.Event()

    def hold() -> None:
        begun.set()
        assert held.wait(20)
        made.append("a1")

    previews.offer("a", (0,), hold)
    assert begun.wait(20)
    for name in ("a2", "b1", "a3", "b2", "a4"):
        previews.offer(name[0], (0,), lambda name=name: made.append(name))  # type: ignore[misc]
    held.set()
    previews.close()
    assert made == ["a1", "a4", "b2"]


def test_a_preview_that_fails_is_left_out(tmp_path: Path, models: FakeModels) -> None:
    service = serve(tmp_path, models, components=_with_preview_decoder())
    service._checkpoints["fake"]._runner = models.runner()  # has no such model
    events = ask(service).wait().events
    assert [event.kind for event in events] == ["image"]
    assert ask(service).wait().error is None
    service.close()


def _with_preview_decoder() -> dict[str, Component]:
    names = ("text_encoder", "unet", "vae_decoder", "vae_encoder", PREVIEW_DECODER)
    made = {name: component(name) for name in names}
    inputs = (TensorShape("latents", "FP16", ("rows", 4, "latent_height", "latent_width")),)
    made[PREVIEW_DECODER] = Component(PREVIEW_DECODER, inputs, (), "0" * 64, 0)
    return made


def test_a_preview_decoder_takes_the_place_of_the_colours(tmp_path: Path, models: FakeModels) -> None:
    types = set[torch.dtype]()

    def tiny(inputs: Any) -> Any:
        types.add(inputs["latents"].dtype)
        return {"pixels": inputs["latents"][:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) * 0}

    runner = models.runner()
    runner._models = {**runner._models, PREVIEW_DECODER: tiny}
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    deployment = write_deployment(tmp_path, "fake", components=_with_preview_decoder())
    service = DiffusionService(deployment, runner, policy=policy)
    events = paced(service, models, 3, width=96).events
    assert opened(events[0]).size == (96, 64)
    assert np.asarray(opened(events[0])).ptp() == 0
    assert types == {torch.float16}
    service.close()


def test_large_previews_are_scaled_down(tmp_path: Path, models: FakeModels) -> None:
    service = serve(tmp_path, models)
    checkpoint = service._checkpoints["fake"]
    assert checkpoint.preview(torch.zeros(4, 100, 600)).size == (512, 85)
    assert checkpoint.preview(torch.zeros(4, 64, 64)).size == (64, 64)
    service.close()


@pytest.mark.parametrize("value", [-1, 151, 2.5])
def test_the_interval_is_checked(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="preview_every is"):
        GenerateRequest(prompt="a", preview_every=value)
