"""The service over components that come and go: who waits, who is told what, and that every path ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffuserve import service as module
from diffuserve.errors import CancelledError, ComponentFailedError, DeadlineError, UnsupportedError
from diffuserve.manifest import Deployment
from diffuserve.request import GenerateRequest
from diffuserve.residency import Limits
from diffuserve.server.checks import models_at_start
from diffuserve.server.errors import ServerSetupError
from diffuserve.server.options import ServerOptions
from diffuserve.service import DiffusionService
from diffuserve.sharing import SharingOptions, models_of
from unit.fakes import FakeModels, Recorder, Unreachable, write_deployment

GB = 10**9


class Control:
    """Models whose loads wait where a test says so, and fail where it says so."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.did: list[str] = []
        self.fails: dict[str, str] = {}
        self.raises: Exception | None = None
        self.may_load = threading.Event()
        self.may_load.set()
        self.loading = threading.Event()

    def load(self, model: str) -> None:
        self.did.append(f"load {model}")
        self.loading.set()
        assert self.may_load.wait(20)
        if self.raises is not None:
            raise self.raises
        if model in self.fails:
            raise ComponentFailedError(self.fails[model], component=model)
        self.ready.add(model)

    def unload(self, model: str) -> None:
        self.did.append(f"unload {model}")
        self.ready.discard(model)

    def is_ready(self, model: str) -> bool:
        return model in self.ready


def two(root: Path) -> Deployment:
    """Checkpoints a and b: UNets of 2 GB of their own, and 1 GB of each other component in common."""
    deployment = write_deployment(root, "a", "b")
    for name in "ab":
        manifest = deployment.manifest(name)
        components = {
            part: replace(one, bytes=2 * GB, model=f"{name}_unet") if part == "unet" else replace(one, bytes=GB)
            for part, one in manifest.components.items()
        }
        text = replace(manifest, components=components).to_json()
        (deployment.folder(name) / "manifest.json").write_text(text, encoding="utf-8")
    return deployment


Make = Callable[..., DiffusionService]


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def make(tmp_path: Path, control: Control) -> Iterator[Make]:
    made: list[DiffusionService] = []

    def make(**limits: Any) -> DiffusionService:
        models = FakeModels()
        runner = models.runner()
        runner._models = {**runner._models, "a_unet": models.unet, "b_unet": models.unet}
        service = DiffusionService(two(tmp_path), runner, control=control, limits=Limits(stay=0.0, **limits))
        service.open()
        made.append(service)
        return service

    yield make
    control.may_load.set()
    for service in made:
        service.close()


def ask(service: DiffusionService, checkpoint: str, **values: Any) -> Recorder:
    reply = Recorder()
    service.submit(
        GenerateRequest(prompt="red", seed=1, steps=3, sampler="ddim", checkpoint=checkpoint, **values), reply
    )
    return reply


def told(service: DiffusionService, name: str) -> dict[str, Any]:
    status: dict[str, Any] = service.status()
    one: dict[str, Any] = status["checkpoints"][name]
    return one


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_waits_for_its_components_and_is_told_for_how_long(make: Make, control: Control) -> None:
    service = make()
    control.may_load.clear()
    reply = ask(service, "a", progress_every=1)
    assert control.loading.wait(20)
    assert [event.kind for event in reply.events] == ["queued"]
    assert reply.events[0].info["eta_ms"] >= 1000
    assert (told(service, "a")["state"], told(service, "a")["waiting"]) == ("loading", 1)
    control.may_load.set()
    assert reply.wait().error is None
    assert [event.kind for event in reply.events].count("queued") == 1
    info = reply.events[-1].info
    assert 0 < info["load_s"] <= info["queued_s"]
    assert "load_s" not in ask(service, "a").wait().events[-1].info


def test_what_two_have_in_common_is_loaded_once_and_stays_with_the_last(make: Make, control: Control) -> None:
    service = make(budget=6 * GB)  # 3 GB in common, and one UNet
    for name in "abab":
        assert ask(service, name).wait().error is None
        assert service.status()["resident_bytes"] <= 6 * GB  # type: ignore[operator]
    unets = [did for did in control.did if "unet" in did]
    assert unets == (["load a_unet", "unload a_unet", "load b_unet", "unload b_unet"] * 2)[:-1]
    assert control.ready >= {"text_encoder", "vae_decoder", "vae_encoder", "b_unet"}


def test_a_load_that_fails_ends_its_requests_alone_and_is_tried_again(make: Make, control: Control) -> None:
    service = make(retry=0.3)
    control.fails["b_unet"] = "b_unet: model.onnx is missing"
    failed, served = ask(service, "b"), ask(service, "a")
    error = failed.wait().error
    assert isinstance(error, ComponentFailedError)
    assert "b cannot be loaded: b_unet: model.onnx is missing" in error.message
    assert served.wait().error is None
    with pytest.raises(ComponentFailedError, match=r"model\.onnx is missing"):
        ask(service, "b")
    assert error.__traceback__ is None, "an error that is kept must not keep those that it was raised through"
    assert "is missing" in told(service, "b")["error"]
    control.fails.clear()
    until(lambda: "error" not in told(service, "b"))
    assert ask(service, "b").wait().error is None


def test_a_bug_in_a_load_fails_it_and_others_are_loaded(make: Make, control: Control) -> None:
    service = make()
    control.raises = PermissionError(13, "Permission denied")
    error = ask(service, "a").wait().error
    assert isinstance(error, ComponentFailedError)
    assert "a cannot be loaded: " in error.message
    assert "PermissionError(13, 'Permission denied')" in error.message
    control.raises = None
    assert ask(service, "b").wait().error is None


def test_those_that_wait_for_a_load_can_leave_and_be_late(
    make: Make, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    service = make()
    assert ask(service, "a").wait().error is None
    control.may_load.clear()
    control.loading.clear()
    cancelled, late = ask(service, "b"), ask(service, "b", deadline_ms=30_000)
    assert control.loading.wait(20)
    (job,) = [job for job in service._jobs if job.deadline]
    job.deadline = time.monotonic()
    cancelled.cancelled = True
    assert isinstance(cancelled.wait().error, CancelledError)
    assert isinstance(late.wait().error, DeadlineError)
    assert control.did[-1] == "load b_unet", "they hear it while the load goes on"
    assert told(service, "b")["waiting"] == 0
    with pytest.raises(DeadlineError, match="would be done in"):
        ask(service, "b", deadline_ms=1)


def test_a_drain_hands_over_those_that_wait_for_a_load(make: Make, control: Control) -> None:
    service = make()
    control.may_load.clear()
    reply = ask(service, "a")
    service.drain(0.0)
    assert reply.wait().events[-1].kind == "snapshot"


def test_a_drain_is_not_stopped_by_a_client_that_cannot_be_told(make: Make, control: Control) -> None:
    service, gone = make(), Unreachable()
    control.may_load.clear()
    service.submit(GenerateRequest(prompt="red", steps=3, checkpoint="a"), gone)
    other = ask(service, "a")
    service.drain(0.0)
    assert other.wait().events[-1].kind == "snapshot"


def test_one_that_cannot_be_told_that_it_waits_ends_and_is_kept_nowhere(make: Make, control: Control) -> None:
    service, gone = make(), Unreachable()
    control.may_load.clear()
    service.submit(GenerateRequest(prompt="red", steps=3, checkpoint="a", progress_every=1), gone)
    assert "shared memory" in str(gone.wait().error)
    assert not service._jobs
    assert not service._unprepared
    assert told(service, "a")["waiting"] == 0


def test_closing_ends_those_that_wait_for_a_load(make: Make, control: Control) -> None:
    service = make()
    control.may_load.clear()
    reply = ask(service, "a")
    closing = threading.Thread(target=service.close)
    closing.start()
    assert isinstance(reply.wait().error, CancelledError)
    control.may_load.set()
    closing.join(20)
    assert not closing.is_alive()


def test_an_idle_checkpoint_leaves_and_comes_back(make: Make, control: Control) -> None:
    service = make(idle=0.1)
    assert ask(service, "a").wait().error is None
    until(lambda: service.status()["resident_bytes"] == 0)
    assert not control.ready
    assert not service.may_use("a_unet")
    assert ask(service, "a").wait().events[-1].info["load_s"] > 0


def test_what_can_never_fit_is_refused_with_the_numbers(make: Make) -> None:
    service = make(budget=4 * GB)
    with pytest.raises(UnsupportedError, match=r"a needs 5\.\d\d GB.* budget is 4\.00 GB; raise the budget"):
        ask(service, "a")


def test_options_survive_the_way_through_the_environment() -> None:
    options = SharingOptions(Limits(budget=3 * GB, idle=60.0, stay=1.5, loads=3), {"a": 2.5}, ("b",))
    assert SharingOptions.from_environment(options.environment()) == options
    assert SharingOptions.from_environment({}) == SharingOptions()
    for name, text in {
        "WEIGHTS": "a=x",
        "MEMORY_BUDGET_GB": "much",
        "LOADS_A_MINUTE": "0",
        "IDLE_RELEASE_S": "nan",
    }.items():
        with pytest.raises(ValueError, match=r"must be"):
            SharingOptions.from_environment({f"DIFFUSERVE_{name}": text})
    for name in ("MEMORY_BUDGET_GB", "LOADS_A_MINUTE", "LEAST_STAY_S"):
        with pytest.raises(ValueError, match=f"DIFFUSERVE_{name} is 'inf', and must be a number"):
            SharingOptions.from_environment({f"DIFFUSERVE_{name}": "inf"})


def test_a_server_begins_with_what_its_budget_holds(tmp_path: Path) -> None:
    deployment = two(tmp_path)
    everything = ("a_unet", "b_unet", "old_unet", "text_encoder", "vae_decoder", "vae_encoder")

    def begins(**values: Any) -> tuple[str, ...]:
        return models_at_start(ServerOptions(deployment.root, sharing=SharingOptions(**values)), everything)

    assert begins() == tuple(one for one in everything if one != "old_unet"), "no manifest names it"
    size = sum(models_of(deployment)["a"].values())
    one_fits = Limits(budget=size + GB)
    assert begins(limits=one_fits) == ("a_unet", "text_encoder", "vae_decoder", "vae_encoder")
    assert begins(limits=one_fits, pinned=("b",)) == ("b_unet", "text_encoder", "vae_decoder", "vae_encoder")
    with pytest.raises(ServerSetupError, match="pinned checkpoints need 7"):
        begins(limits=one_fits, pinned=("a", "b"))
    with pytest.raises(ServerSetupError, match="'c' has a weight or is pinned, and is not deployed; there is a, b"):
        begins(weights={"c": 1.0})
