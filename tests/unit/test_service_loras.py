"""LoRAs through the service, over fake components: who shares calls, who waits for room, what a snapshot holds."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffuserve import service as service_module
from diffuserve.admission import Admission
from diffuserve.components import InProcessRunner
from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.errors import CancelledError, InvalidArgumentError, NotFoundError
from diffuserve.lora import folder as module
from diffuserve.lora.layout import LoraLayout
from diffuserve.manifest import Deployment
from diffuserve.request import GenerateRequest
from diffuserve.service import DiffusionService
from diffuserve.telemetry import Telemetry
from unit.fakes import FakeModels, Recorder, component, write_deployment
from unit.lora.files import LAYOUTS, TO_Q, WORDS, adapted, pair, put, tensors_of

KEY = b"the fleet's key"
UNET_BYTES = 4 * sum(layout.size for layout in LAYOUTS.values())


class AdaptedModels(FakeModels):
    """Fakes in which every number of a row's adapter counts. `stacks` are the UNet's `lora`, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[torch.Tensor] = []
        self.encoded: list[int] = []

    def runner(self) -> InProcessRunner:
        models = {"text_encoder": self.read, "unet": self.unet, "vae_decoder": self.decode, "vae_encoder": self.encode}
        return InProcessRunner(models)

    def read(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.encoded.append(len(inputs["input_ids"]))
        hidden = self.text(inputs)["hidden_states"]
        return {"hidden_states": hidden + self._told(LAYOUTS["text_encoder"], inputs)[:, None, None]}

    def unet(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.stacks.append(inputs["lora"])
        output = super().unet(inputs)["model_output"]
        return {"model_output": output + self._told(LAYOUTS["unet"], inputs)[:, None, None, None]}

    @staticmethod
    def _told(layout: LoraLayout, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A number of each row's products."""
        changes = []
        for vector in inputs["lora"]:
            products = [(one.up @ one.down).sum() for one in layout.factors(vector).values()]
            changes.append(torch.stack(products).sum() / 50)
        return torch.stack(changes)[inputs["lora_index"]]


class Held(Telemetry):
    """What the registry told."""

    def __init__(self) -> None:
        self.hits, self.misses, self.most = 0, 0, 0

    def lora(self, hit: bool, held_bytes: int) -> None:
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)
        self.most = max(self.most, held_bytes)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_S", 0.0)


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    adapters = {name: adapted(component(name), layout) for name, layout in LAYOUTS.items()}
    components = {**{one: component(one) for one in parts}, **adapters}
    made = write_deployment(tmp_path / "one", "fake", components=components)
    put(made.loras, "a", tensors_of(seed=1))
    put(made.loras, "b", tensors_of(seed=2))
    down, up = pair(2, 3, 3)
    put(made.loras, "words", {f"text_encoder.{WORDS}.lora_A.weight": down, f"text_encoder.{WORDS}.lora_B.weight": up})
    return made


def make_service(deployment: Deployment, models: FakeModels, **options: Any) -> DiffusionService:
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    return DiffusionService(deployment, models.runner(), **{"policy": policy, "key": KEY, **options})


@pytest.fixture
def models() -> AdaptedModels:
    return AdaptedModels()


@pytest.fixture
def service(deployment: Deployment, models: AdaptedModels) -> Iterator[DiffusionService]:
    service = make_service(deployment, models)
    yield service
    service.close()


def ask(service: DiffusionService, *loras: str, **values: Any) -> Recorder:
    reply = Recorder()
    asked = {"prompt": "a ring", "seed": 1, "steps": 4, "sampler": "ddim", "guidance_scale": 1.0, **values}
    service.submit(GenerateRequest(**asked, loras=loras), reply)
    return reply


def pixels(reply: Recorder) -> Any:
    assert reply.error is None, reply.error
    return np.asarray(Image.open(BytesIO(reply.events[-1].data))).astype(int)


def hold(models: FakeModels) -> threading.Event:
    """The UNet's calls wait for this."""
    opened = threading.Event()
    models.before_unet = lambda call: None if opened.wait(20) else pytest.fail("nobody opened")
    return opened


MIXES = [(), ("a",), ("b:-1",), ("a:0.5", "b:0.5"), ("words",), ("words:2", "a")]


def test_rows_with_different_loras_share_calls_and_do_not_bleed(
    service: DiffusionService, models: AdaptedModels
) -> None:
    alone = [pixels(ask(service, *mix).wait()) for mix in MIXES]
    assert len({one.tobytes() for one in alone}) == len(MIXES)
    opened = hold(models)
    models.rows.clear()
    replies = [ask(service, *mix) for mix in MIXES * 2]
    service._prepare.submit((1000.0,), opened.set)
    together = [pixels(reply.wait()) for reply in replies]
    assert max(models.rows) >= 2 * len(MIXES) - 1
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(together, alone * 2, strict=True))


def test_a_step_with_the_same_adapters_takes_the_same_tensor(service: DiffusionService, models: AdaptedModels) -> None:
    """By address: a runner in the same process is given the very tensor."""
    opened = hold(models)
    replies = [ask(service, "a", steps=8), ask(service, "a:0.5", "b:0.5", steps=8), ask(service, "a", seed=5, steps=8)]
    service._prepare.submit((1000.0,), opened.set)
    for reply in replies:
        reply.wait()
    full = [one for one in models.stacks if len(one) == 3]
    assert len(full) >= 6
    assert len({one.data_ptr() for one in full}) == 1


def test_an_encoding_with_an_adapter_is_not_taken_for_one_without(
    service: DiffusionService, models: AdaptedModels
) -> None:
    plain, adapted_one = pixels(ask(service).wait()), pixels(ask(service, "words").wait())
    assert sum(models.encoded) == 2
    assert not np.array_equal(plain, adapted_one)
    assert np.array_equal(pixels(ask(service, "words").wait()), adapted_one)
    ask(service, "a").wait()  # which leaves the text encoder as it is
    assert sum(models.encoded) == 2
    ask(service, "words:0.5").wait()
    assert sum(models.encoded) == 3


def test_what_is_told_makes_the_same_picture_again(service: DiffusionService) -> None:
    put(service._checkpoints["fake"].loras._folder._files._root, "long", tensors_of(rank=6, seed=7))
    first = ask(service, "a:0.5", "long:truncate").wait()
    info = first.events[0].info
    assert info["loras"] == ["a:0.5", "long:truncate"]
    (a, long) = info["lora_files"]
    assert (a["name"], a["weight"], a["rank"], a["truncated"], len(a["digest"])) == ("a", 0.5, 2, False, 64)
    assert long["truncated"]
    assert 0 < long["truncation_error"] < 1
    assert np.array_equal(pixels(ask(service, *info["loras"]).wait()), pixels(first))


def test_a_lora_that_is_not_there_is_refused_and_nothing_else_is_disturbed(
    service: DiffusionService, models: AdaptedModels
) -> None:
    alone = pixels(ask(service, "a").wait())
    opened = hold(models)
    beside = ask(service, "a")
    with pytest.raises(NotFoundError, match="loras names gone"):
        ask(service, "gone")
    with pytest.raises(InvalidArgumentError, match="no such form"):
        ask(service, "../a")
    opened.set()
    assert np.array_equal(pixels(beside.wait()), alone)


def test_two_hundred_adapters_with_room_for_twenty(deployment: Deployment, models: AdaptedModels) -> None:
    """All of them at once: pictures are right, and neither files nor adapters take more than the budget."""
    for number in range(200):
        put(deployment.loras, f"n{number}", tensors_of(rank=2, seed=number))
    telemetry, rng = Held(), random.Random(6)
    service = make_service(deployment, models, lora_budget=20 * UNET_BYTES, telemetry=telemetry, policy=None)
    most = [0]
    take = service._room.take

    def watched(*args: Any, **values: Any) -> bool:
        taken = take(*args, **values)
        most[0] = max(most[0], service._room.bytes)
        return taken

    service._room.take = watched  # type: ignore[method-assign]
    numbers = [*range(200), *rng.sample(range(200), 40)]
    replies = [ask(service, f"n{number}", seed=number) for number in numbers]
    pictures = {number: pixels(reply.wait()) for number, reply in zip(numbers, replies, strict=True)}
    assert len({one.tobytes() for one in pictures.values()}) == 200
    for number in rng.sample(numbers, 5):
        assert np.abs(pixels(ask(service, f"n{number}", seed=number).wait()) - pictures[number]).max() <= 1
    assert 2 * UNET_BYTES <= most[0] <= 20 * UNET_BYTES, "as many as came together"
    assert 0 < telemetry.most <= 20 * UNET_BYTES
    assert telemetry.misses >= 200
    assert telemetry.hits > 0
    assert max(len(one) for one in models.stacks) <= LAYOUTS["unet"].adapters
    service.close()


def test_adapters_are_let_go_with_their_requests(service: DiffusionService) -> None:
    gc.disable()  # it must not need to look for circles
    try:
        ask(service, "a").wait()
        ask(service, "b", num_images=2).wait()
        loras = service._checkpoints["fake"].loras
        patience = time.monotonic() + 5
        while loras._alive and time.monotonic() < patience:  # a worker is about to return
            time.sleep(0.001)
        assert (len(loras._alive), service._room.bytes) == (0, 0)
    finally:
        gc.enable()


def test_one_that_waits_for_room_hears_of_the_servers_end(deployment: Deployment, models: AdaptedModels) -> None:
    service = make_service(deployment, models, lora_budget=1)
    opened = hold(models)
    first, second = ask(service, "a"), ask(service, "b")
    while not models.rows:
        time.sleep(0.001)
    closing = threading.Thread(target=service.close)
    closing.start()
    _until(lambda: service.loop._closed)  # before the first makes room
    opened.set()
    closing.join(20)
    assert isinstance(second.wait().error, CancelledError)
    assert first.ended.is_set()


def test_one_that_waits_for_room_can_leave(
    deployment: Deployment, models: AdaptedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_LOOK_S", 0.01)
    service = make_service(deployment, models, lora_budget=1)
    opened = hold(models)
    first, second = ask(service, "a"), ask(service, "b")
    _until(lambda: bool(models.rows))
    second.cancelled = True
    assert isinstance(second.wait().error, CancelledError)
    assert not first.ended.is_set()
    opened.set()
    pixels(first.wait())
    service.close()


def test_a_snapshot_is_resumed_only_with_the_same_loras(deployment: Deployment, models: AdaptedModels) -> None:
    service = make_service(deployment, models)
    expected = pixels(ask(service, "a:0.5", "words", steps=6).wait())
    calls = len(models.rows)
    models.before_unet = lambda call: _until(lambda: service.loop._suspending) if call == calls + 3 else None
    reply = ask(service, "a:0.5", "words", steps=6)
    _until(lambda: len(models.rows) == calls + 3)
    service.drain(0.0)
    (event,) = reply.wait().events
    assert event.kind == "snapshot"
    service.close()

    other = make_service(deployment, AdaptedModels())
    resumed = Recorder()
    other.submit(GenerateRequest(prompt="", resume=event.data), resumed)
    assert np.abs(pixels(resumed.wait()) - expected).max() <= 1
    put(deployment.loras, "a", tensors_of(seed=9))
    with pytest.raises(InvalidArgumentError, match=r"taken with the LoRAs a \(.*\), words .*, and here they are a \("):
        other.submit(GenerateRequest(prompt="", resume=event.data), Recorder())
    (deployment.loras / "a.safetensors").unlink()
    with pytest.raises(NotFoundError, match="loras names a"):
        other.submit(GenerateRequest(prompt="", resume=event.data), Recorder())
    other.close()


def _until(come: Any) -> None:
    patience = time.monotonic() + 20
    while not come():
        assert time.monotonic() < patience
        time.sleep(0.001)


def test_files_are_read_beside_tritons_thread(service: DiffusionService) -> None:
    here, threads = threading.get_ident(), list[int]()

    def submit(request: GenerateRequest, reply: Any, **values: Any) -> None:
        threads.append(threading.get_ident())
        service.submit(request, reply)

    refusals = list[Exception]()
    admission = Admission(submit, lambda reply, request_id, error: refusals.append(error), service.heartbeats)
    reply = Recorder()
    admission.submit(GenerateRequest(prompt="a", steps=1, loras=("a",)), reply, request_id="", trace=None)
    admission.submit(GenerateRequest(prompt="a", loras=("gone",)), Recorder(), request_id="", trace=None)
    admission.close()
    pixels(reply.wait())
    assert here not in threads
    (refused,) = refusals
    assert isinstance(refused, NotFoundError)


def test_a_file_that_is_dropped_is_usable_at_once(service: DiffusionService, deployment: Deployment) -> None:
    with pytest.raises(NotFoundError):
        ask(service, "new")
    put(
        deployment.loras,
        "new",
        {f"unet.{TO_Q}.lora_A.weight": pair(2, 6, 8, 8)[0], f"unet.{TO_Q}.lora_B.weight": pair(2, 6, 8, 8)[1]},
    )
    assert ask(service, "new").wait().events[0].info["lora_files"][0]["name"] == "new"
