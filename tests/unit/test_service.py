"""The service and its loop over fake components: who shares a call, who leaves, and that every path ends."""

from __future__ import annotations

import base64
import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffuserve.checkpoint import Checkpoint
from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.errors import (
    CancelledError,
    ComponentFailedError,
    DeadlineError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
)
from diffuserve.request import GenerateRequest, ResolvedRequest
from diffuserve.service import DiffusionService
from unit.fakes import FakeModels, Recorder, Unreachable, write_deployment


@pytest.fixture
def models() -> FakeModels:
    return FakeModels()


@pytest.fixture
def service(tmp_path: Path, models: FakeModels) -> Iterator[DiffusionService]:
    # Fakes cost nothing, so no count of rows is better than another.
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    service = DiffusionService(write_deployment(tmp_path, "fake"), models.runner(), policy=policy)
    yield service
    service.close()


def ask(service: DiffusionService, **values: Any) -> Recorder:
    reply = Recorder()
    service.submit(
        GenerateRequest(**{"prompt": "a red circle", "seed": 1, "steps": 4, "sampler": "ddim", **values}), reply
    )
    return reply


def pixels(reply: Recorder, number: int = -1) -> Any:
    return np.asarray(Image.open(BytesIO(reply.events[number].data))).astype(int)


class Gate:
    """Holds a UNet call until the test opens it."""

    def __init__(self, models: FakeModels, at_call: int = 1) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._at_call = at_call
        models.before_unet = self._hold

    def _hold(self, call: int) -> None:
        if call == self._at_call:
            self.reached.set()
            assert self._open.wait(20)

    def wait(self) -> None:
        assert self.reached.wait(20)

    def open(self) -> None:
        self._open.set()


def test_one_request_gets_exactly_one_response_with_what_made_it(service: DiffusionService) -> None:
    reply = ask(service, width=96, guidance_scale=3.0).wait()
    (event,) = reply.events
    assert reply.finals == 1
    assert (event.kind, event.index, event.step, event.steps, event.seed) == ("image", 0, 4, 4, 1)
    assert pixels(reply).shape == (64, 96, 3)
    asked = {"prompt": "a red circle", "width": 96, "height": 64, "guidance_scale": 3.0, "sampler": "ddim", "seed": 1}
    assert asked.items() <= event.info.items()
    assert event.info["joined_at_step"] == 1
    json.loads(event.info_json())


def test_info_makes_the_same_picture_again(service: DiffusionService) -> None:
    first = ask(service, seed=-1, num_images=2, guidance_scale=None, sampler=None).wait()
    for event in first.events:
        again = {name: event.info[name] for name in GenerateRequest(prompt="").parameters()}
        assert ask(service, **again).wait().events[0].data == event.data


def test_a_picture_is_let_go_once_it_became_latents(
    service: DiffusionService, models: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, resolve = list[Any](), Checkpoint.resolve

    def resolved(self: Checkpoint, request: GenerateRequest) -> ResolvedRequest:
        one = resolve(self, request)
        decoded.append(weakref.ref(one.image))
        return one

    monkeypatch.setattr(Checkpoint, "resolve", resolved)
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    gate = Gate(models)
    gc.disable()  # a request is part of circles, which are found much later
    try:
        reply = ask(service, init_image=file.getvalue(), steps=2, strength=0.9)
        gate.wait()
        assert decoded[0]() is None
        (job,) = service._jobs
        assert job.resolved.request.given_bytes == job.beginning.resolved.request.given_bytes == 0
        gate.open()
        assert reply.wait().events[0].info["strength"] == 0.9
    finally:
        gc.enable()


def test_rows_of_all_active_requests_share_each_call(service: DiffusionService, models: FakeModels) -> None:
    gate = Gate(models)
    first = ask(service, steps=3)
    gate.wait()
    others = [ask(service, steps=3, guidance_scale=guidance) for guidance in (1.0, 5.0)]
    _until_encoded(service, 2)
    gate.open()
    for reply in (first, *others):
        reply.wait()
    # 2 rows alone; then 2 + 1 + 2 rows together, each with its own timestep; then the first is done.
    assert models.rows == [2, 5, 5, 3]
    assert len(set(models.timesteps[1])) == 2
    assert [reply.events[0].info["joined_at_step"] for reply in (first, *others)] == [1, 2, 2]


def _until(come: Callable[[], bool]) -> None:
    patience = time.monotonic() + 20
    while not come():
        assert time.monotonic() < patience
        time.sleep(0.001)


def _until_encoded(service: DiffusionService, count: int) -> None:
    """Wait until that many requests went through the one prepare worker, for which nothing is less urgent."""
    prepared = threading.Event()
    service._prepare.submit((1000.0,), prepared.set)
    assert prepared.wait(20)
    assert len(service.loop._joining) == count


def test_a_picture_does_not_depend_on_its_company(service: DiffusionService, models: FakeModels) -> None:
    alone = pixels(ask(service, steps=7, sampler="dpmpp_2m").wait())
    gate = Gate(models, at_call=len(models.rows) + 1)
    company = [ask(service, seed=9, steps=5, sampler=sampler) for sampler in ("euler", "pndm")]
    gate.wait()
    asked = ask(service, steps=7, sampler="dpmpp_2m")
    gate.open()
    together = pixels(asked.wait())
    for reply in company:
        reply.wait()
    assert np.abs(alone - together).max() <= 1


def test_images_of_one_request_have_their_own_seeds(service: DiffusionService) -> None:
    several = ask(service, num_images=3, seed=5).wait()
    assert sorted(event.index for event in several.events) == [0, 1, 2]
    for number, event in enumerate(several.events):
        alone = ask(service, seed=5 + event.index).wait()
        assert event.seed == 5 + event.index
        assert np.abs(pixels(several, number) - pixels(alone)).max() <= 1


def test_sizes_take_turns(service: DiffusionService, models: FakeModels) -> None:
    gate = Gate(models)
    small = ask(service, steps=4)
    gate.wait()
    large = ask(service, steps=4, width=96, guidance_scale=1)
    _until_encoded(service, 1)
    gate.open()
    small.wait()
    large.wait()
    assert models.rows == [2, 1, 2, 1, 2, 1, 2, 1]


def test_progress_counts_denoising_steps(service: DiffusionService) -> None:
    reply = ask(service, steps=7, progress_every=2, sampler="pndm").wait()
    assert [(event.kind, event.step) for event in reply.events] == [
        ("queued", 0),
        ("progress", 2),
        ("progress", 4),
        ("progress", 6),
        ("image", 7),
    ]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_formats_and_base64(service: DiffusionService, image_format: str) -> None:
    reply = ask(service, image_format=image_format, image_encoding="base64").wait()
    image = Image.open(BytesIO(base64.b64decode(reply.events[0].data, validate=True)))
    assert image.format == image_format.upper()


def test_long_prompts_are_read_whole_up_to_the_limit(service: DiffusionService) -> None:
    infos = [ask(service, prompt="red " * count).wait().events[0].info for count in (75, 76, 225, 226, 450)]
    assert [info["prompt_chunks"] for info in infos] == [1, 2, 3, 6, 6]
    with pytest.raises(InvalidArgumentError, match=r"prompt takes 7 windows of 75 tokens, and at most 6 .* shorten"):
        ask(service, prompt="red " * 451)
    with pytest.raises(InvalidArgumentError, match=r"negative_prompt takes 7 windows"):
        ask(service, negative_prompt="red " * 451)
    assert ask(service, negative_prompt="red " * 451, guidance_scale=1.0).wait().events


@pytest.mark.parametrize("value", [0, 63, 65, 208, 100_000, -64])
def test_sizes_outside_the_profile_are_refused(service: DiffusionService, value: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"width is {value}, and must be a multiple of 16 from 32 to 192"):
        ask(service, width=value)
    ask(service).wait()


def test_unknown_names_are_refused_with_what_there_is(service: DiffusionService) -> None:
    with pytest.raises(InvalidArgumentError, match="must be one of ddim"):
        ask(service, sampler="__import__('os')")
    with pytest.raises(NotFoundError, match="deployed are fake"):
        ask(service, checkpoint="../fake")


def test_an_error_in_the_unet_reaches_every_request_of_the_call(service: DiffusionService, models: FakeModels) -> None:
    gate = Gate(models)
    replies = [ask(service)]
    gate.wait()
    replies += [ask(service, seed=2), ask(service, seed=3, num_images=2)]
    _until_encoded(service, 3)

    def fail(call: int) -> None:
        raise RuntimeError("out of memory")

    models.before_unet = fail
    gate.open()
    for reply in replies:
        error = reply.wait().error
        assert isinstance(error, ComponentFailedError)
        assert "unet" in error.message
        assert "out of memory" in error.message
        assert reply.finals == 1
    models.before_unet = lambda call: None
    assert ask(service).wait().error is None


def test_a_wrong_number_of_rows_names_the_component(service: DiffusionService, models: FakeModels) -> None:
    unet = models.unet
    models.unet = lambda inputs: {"model_output": unet(inputs)["model_output"][:1]}  # type: ignore[method-assign]
    service.loop._runner = models.runner()
    assert "unet gave 1 rows for 2" in str(ask(service).wait().error)


@pytest.mark.parametrize(
    "place", ["diffuserve.engine.pool.LatentPool.step", "diffuserve.engine.policy.StepPolicy.choose"]
)
def test_a_bug_anywhere_in_the_loop_is_an_error_and_never_silence(
    service: DiffusionService, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(place, bug)
    reply = ask(service).wait()
    assert isinstance(reply.error, InternalError)
    assert "a bug" in reply.error.message


def test_a_request_that_can_not_be_done_in_time_is_refused_with_its_eta(
    service: DiffusionService, models: FakeModels
) -> None:
    gate = Gate(models)
    running = ask(service, steps=100)
    gate.wait()
    with pytest.raises(DeadlineError, match="would be done in") as refused:
        ask(service, steps=150, deadline_ms=1)
    assert refused.value.detail["eta_ms"] > refused.value.detail["deadline_ms"]
    gate.open()
    assert running.wait().error is None


def test_a_deadline_that_passes_ends_the_request_and_frees_its_rows(
    service: DiffusionService, models: FakeModels
) -> None:
    for _ in range(2):  # so that its speed is known, and it is let in
        ask(service, steps=20).wait()
    gate = Gate(models, at_call=len(models.rows) + 2)
    late, stays = ask(service, steps=10, deadline_ms=2000), ask(service, steps=10, guidance_scale=1)
    gate.wait()
    assert late.ended.wait(0) is False
    service.loop._clock = lambda: time.monotonic() + 10
    gate.open()
    error = late.wait().error
    assert isinstance(error, DeadlineError)
    assert error.detail["steps_done"] < 10
    assert stays.wait().error is None


def test_higher_priority_goes_first_when_rows_are_short(tmp_path: Path, models: FakeModels) -> None:
    service = DiffusionService(write_deployment(tmp_path, "fake", max_rows=2), models.runner())
    gate = Gate(models)
    first = ask(service, steps=2)
    gate.wait()
    low, high = ask(service, priority=0), ask(service, priority=5)
    _until_encoded(service, 2)
    gate.open()
    for reply in (first, low, high):
        reply.wait()
    assert high.events[0].info["joined_at_step"] < low.events[0].info["joined_at_step"]
    service.close()


def test_the_loop_outlives_a_bug_in_a_decision(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StepPolicy, "choose", lambda *_: 1 / 0)
        assert isinstance(ask(service).wait().error, InternalError)
    assert ask(service).wait().error is None


def test_a_client_that_cannot_be_told_takes_nobody_along(service: DiffusionService) -> None:
    may_prepare = threading.Event()
    service._prepare.submit((-1e9,), may_prepare.wait)
    gone = Unreachable()
    gone.cancelled = True
    service.submit(GenerateRequest(prompt="a red circle"), gone)
    other = ask(service)
    may_prepare.set()
    assert other.wait().error is None
    assert isinstance(gone.error, CancelledError)
    assert not service._jobs


def test_an_overflow_is_reported_instead_of_a_black_picture(service: DiffusionService, models: FakeModels) -> None:
    models.decode = lambda inputs: {"pixels": torch.full((1, 3, 64, 64), float("nan"))}  # type: ignore[method-assign]
    service._checkpoints["fake"]._runner = models.runner()
    assert isinstance(ask(service).wait().error, ComponentFailedError)


def test_cancelled_rows_leave_before_the_next_step(service: DiffusionService, models: FakeModels) -> None:
    gate = Gate(models, at_call=2)
    stays, goes = ask(service, steps=5, guidance_scale=1), ask(service, steps=50, seed=2)
    gate.wait()
    goes.cancelled = True
    gate.open()
    assert isinstance(goes.wait().error, CancelledError)
    stays.wait()
    assert 3 not in models.rows[2:]


def test_more_requests_than_the_limit_are_turned_away(tmp_path: Path, models: FakeModels) -> None:
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 8, max_images=2)
    service = DiffusionService(write_deployment(tmp_path, "fake"), models.runner(), policy=policy)
    gate = Gate(models)
    taken = [ask(service), ask(service)]
    with pytest.raises(QueueFullError, match="the limit of 2; try again in"):
        ask(service)
    gate.open()
    for reply in taken:
        assert reply.wait().error is None
    ask(service).wait()
    service.close()


def test_images_that_wait_to_be_decoded_count_and_those_of_clients_that_left_are_not_decoded(
    tmp_path: Path, models: FakeModels
) -> None:
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, max_images=4)
    service = DiffusionService(write_deployment(tmp_path, "fake"), models.runner(), policy=policy)
    decoding, may_decode = threading.Semaphore(0), threading.Event()

    def decode() -> None:
        decoding.release()
        assert may_decode.wait(20)

    models.before_decode = decode
    stays = [ask(service), ask(service)]
    assert all(decoding.acquire(timeout=20) for _ in stays)
    stays, goes = [*stays, ask(service, steps=5)], ask(service, steps=6)
    _until(lambda: not any(job.present() for job in service._jobs))
    with pytest.raises(QueueFullError, match="4 images are in the server"):
        ask(service)
    goes.cancelled = True
    may_decode.set()
    assert isinstance(goes.wait().error, CancelledError)
    assert all(reply.wait().error is None for reply in stays)
    assert ask(service).wait().error is None
    assert sum(decoding.acquire(blocking=False) for _ in range(9)) == 2, "of the third that stays, and of the last"
    service.close()


def test_a_call_has_at_most_the_profiles_rows(tmp_path: Path, models: FakeModels) -> None:
    service = DiffusionService(write_deployment(tmp_path, "fake", max_rows=4), models.runner())
    replies = [ask(service, num_images=5, steps=6), ask(service, guidance_scale=1, steps=6)]
    for reply in replies:
        assert reply.wait().error is None
    assert max(models.rows) <= 4
    assert sum(models.rows) == 6 * (5 * 2 + 1)
    service.close()


def test_closing_answers_everyone(tmp_path: Path, models: FakeModels) -> None:
    service = DiffusionService(write_deployment(tmp_path, "fake"), models.runner())
    gate = Gate(models, at_call=3)
    replies = [ask(service, steps=100), ask(service, steps=100, width=96)]
    gate.wait()
    closing = threading.Thread(target=service.close)
    closing.start()
    _until(lambda: service.loop._closed)
    gate.open()
    closing.join(20)
    for reply in replies:
        assert isinstance(reply.wait().error, CancelledError)
