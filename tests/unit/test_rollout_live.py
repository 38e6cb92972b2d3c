"""A service follows its deployment's folder: new checkpoints, the table, and what of both it cannot use."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffuserve.components import InProcessRunner
from diffuserve.errors import ComponentFailedError, NotFoundError
from diffuserve.manifest import Component, Deployment
from diffuserve.request import GenerateRequest
from diffuserve.rollout import Alias, RolloutTable, change_table, parse_weights
from diffuserve.service import DiffusionService
from diffuserve.snapshot import decode_snapshot
from diffuserve.telemetry import Telemetry
from unit.fakes import FakeModels, Recorder, component, write_deployment

PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
NAMES = ("v1", "v2", "v3", "v4", "shop")


class Loading:
    """Loads models; `fails` says of which checkpoint with what, and `gate` holds the loads back."""

    def __init__(self) -> None:
        self.did, self.fails, self.ready = list[str](), dict[str, str](), set[str]()
        self.gate = threading.Event()
        self.gate.set()

    def load(self, model: str) -> None:
        name = model.partition("_")[0]
        if model.endswith("_unet"):
            self.did.append(name)
        assert self.gate.wait(20)
        if name in self.fails:
            raise ComponentFailedError(self.fails[name])
        self.ready.add(model)

    def unload(self, model: str) -> None:
        self.ready.remove(model)

    def is_ready(self, model: str) -> bool:
        return model.startswith("v1_") or model in self.ready


def components(name: str) -> dict[str, Component]:
    return {part: replace(component(part), model=f"{name}_{part}") for part in PARTS}


class Told(Telemetry):
    def __init__(self) -> None:
        self.names = list[str]()

    def deployed(self, checkpoint: str) -> None:
        self.names.append(checkpoint)


class Served:
    """A service over a folder that the test changes."""

    def __init__(self, root: Path) -> None:
        self.root, self.loading, self.told, self.models = root, Loading(), Told(), FakeModels()
        self.service = self.start()

    def start(self) -> DiffusionService:
        functions = self.models.text, self.models.unet, self.models.decode, self.models.encode
        runner = InProcessRunner(
            {f"{name}_{part}": act for name in NAMES for part, act in zip(PARTS, functions, strict=True)}
        )
        deployment = Deployment.load(self.root)
        service = DiffusionService(deployment, runner, telemetry=self.told, control=self.loading, key=b"k" * 16)
        service.open()
        return service

    def export(self, name: str, key: str = "0") -> None:
        """Add a checkpoint as the export does: deployment.json last, and whole."""
        staging = self.root / f".export-{name}"
        made = write_deployment(staging, name, key=key, components=components(name))
        made.folder(name).rename(self.root / "checkpoints" / name)
        names = (*Deployment.load(self.root).checkpoints, name)
        self.write("deployment.json", Deployment(self.root, names).to_json())

    def write(self, file: str, text: str) -> None:
        (self.root / f".{file}").write_text(text)
        (self.root / f".{file}").replace(self.root / file)

    def set(self, text: str, default: str | None = None) -> None:
        name, weights = parse_weights(text)

        def change(table: RolloutTable) -> RolloutTable:
            known = table.aliases.get(name)
            changed = known.changed(weights) if known else Alias.new(weights)
            return table.with_alias(name, changed).with_default(default)

        change_table(self.root, Deployment.load(self.root).checkpoints, change)

    def change(self, change: Callable[[Alias], Alias]) -> None:
        change_table(self.root, ("v1", "v2"), lambda table: table.with_alias("shop", change(table.aliases["shop"])))

    @property
    def written(self) -> int:
        return (self.root / "rollout.json").stat().st_mtime_ns

    @property
    def status(self) -> dict[str, Any]:
        status: Any = self.service.status()["rollout"]
        return dict(status)

    def wait(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        until = time.monotonic() + 20
        while not condition(status := self.status):
            assert time.monotonic() < until, status
            time.sleep(0.01)
        return status

    def ask(self, **values: Any) -> Recorder:
        reply, values = Recorder(), {"prompt": "a", "steps": 1, "sampler": "ddim", **values}
        request_id = values.pop("request_id", "")
        self.service.submit(GenerateRequest(**values), reply, request_id=request_id)
        return reply

    def held(self, **values: Any) -> tuple[Recorder, threading.Event]:
        """A request in its first UNet call, which no call goes on from before the event is set."""
        stepped, go_on = threading.Event(), threading.Event()

        def hold(call: int) -> None:
            stepped.set()
            assert go_on.wait(20)

        self.models.before_unet = hold
        reply = self.ask(**values)
        assert stepped.wait(20)
        return reply, go_on

    def info(self, **values: Any) -> dict[str, Any]:
        return dict(self.ask(**values).wait().events[-1].info)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("diffuserve.rollout.live._POLL_SECONDS", 0.02)
    write_deployment(tmp_path, "v1", components=components("v1"))
    one = Served(tmp_path)
    yield one
    one.loading.gate.set()
    one.service.close()


def test_a_version_that_is_exported_later_is_tried_promoted_and_rolled_back(served: Served) -> None:
    info = served.info()
    assert info["checkpoint"] == "v1"
    assert "alias" not in info
    with pytest.raises(NotFoundError, match="'v2' is not deployed; deployed are v1"):
        served.ask(checkpoint="v2")
    served.export("v2")
    served.wait(lambda status: status["checkpoints"] == ["v1", "v2"])
    assert (served.loading.did, served.told.names) == (["v2"], ["v2"])
    assert served.info(checkpoint="v2")["checkpoint"] == "v2"
    assert served.info()["checkpoint"] == "v1", "the default is as before"

    served.set("shop=v1:75,v2:25", default="shop")
    status = served.wait(lambda status: status["aliases"])
    assert status["aliases"] == {"shop": {"v1": 0.75, "v2": 0.25}}
    found = Counter(served.info(client_tag=f"client {number}")["checkpoint"] for number in range(80))
    assert set(found) == {"v1", "v2"}
    assert found["v1"] > found["v2"]
    assert served.info(seed=3)["alias"] == "shop"

    served.change(lambda alias: alias.promoted("v2"))
    served.wait(lambda status: status["aliases"]["shop"] == {"v2": 1.0})
    assert {served.info(client_tag=f"client {number}")["checkpoint"] for number in range(10)} == {"v2"}
    served.change(Alias.rolled_back)
    served.wait(lambda status: status["aliases"]["shop"] == {"v1": 1.0})
    assert served.info()["checkpoint"] == "v1"


def test_a_request_s_own_values_decide(served: Served) -> None:
    served.export("v2")
    served.wait(lambda status: "v2" in status["checkpoints"])
    served.set("shop=v1,v2")
    served.wait(lambda status: status["aliases"])

    def got(**values: Any) -> set[str]:
        return {served.info(checkpoint="shop", **values)["checkpoint"] for _ in range(6)}

    for tag in ("ann", "bob", "eve"):
        first = got(client_tag=tag, seed=1)
        assert first == got(client_tag=tag, prompt="another", seed=2), "a client stays with one version"
        assert len(first) == 1
    for seed in range(6):
        assert len(got(seed=seed)) == 1, "the same request makes the same picture"
        assert len(got(request_id=str(seed))) == 1
    assert {served.info(checkpoint="shop", seed=seed)["checkpoint"] for seed in range(20)} == {"v1", "v2"}
    assert {served.info(checkpoint="shop")["checkpoint"] for _ in range(40)} == {"v1", "v2"}


def test_a_picture_s_info_makes_it_again_whatever_the_alias_has_become(served: Served) -> None:
    served.export("v2")
    served.wait(lambda status: "v2" in status["checkpoints"])
    served.set("shop=v2")
    served.wait(lambda status: status["aliases"])
    event = served.ask(checkpoint="shop").wait().events[-1]
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"]["shop"] == {"v1": 1.0})
    again = {name: event.info[name] for name in GenerateRequest(prompt="").parameters()}
    assert served.ask(**again).wait().events[-1].data == event.data
    assert again["checkpoint"] == "v2"


def test_a_snapshot_pins_the_checkpoint(served: Served) -> None:
    served.export("v2")
    served.wait(lambda status: "v2" in status["checkpoints"])
    served.set("shop=v2")
    served.wait(lambda status: status["aliases"])
    reply, go_on = served.held(checkpoint="shop", steps=8, seed=1)
    draining = threading.Thread(target=served.service.drain, args=(0.0,))
    draining.start()
    while served.service.status()["state"] != "draining":
        time.sleep(0.001)
    go_on.set()
    draining.join(20)
    snapshot = reply.wait().events[-1].data
    assert decode_snapshot(snapshot, b"k" * 16).resolved.checkpoint == "v2"
    served.set("shop=v1")
    served.service.close()
    served.service = served.start()
    resumed = Recorder()
    served.service.submit(GenerateRequest(prompt="", resume=snapshot), resumed)
    info = resumed.wait().events[-1].info
    assert (info["checkpoint"], info["alias"]) == ("v2", "shop")


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing_and_is_tried_again(served: Served) -> None:
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"])
    served.loading.fails["v2"] = "the engine is for another card"
    served.export("v2")
    status = served.wait(lambda status: status["failed"])
    assert "the engine is for another card" in status["failed"]["v2"]
    served.set("shop=v2")
    status = served.wait(lambda status: status["problem"] and status["failed"])
    assert "names v2; there are v1" in status["problem"]
    assert status["aliases"] == {"shop": {"v1": 1.0}}
    assert served.wait(lambda status: status["refused"])["refused"] == served.written
    assert served.info(checkpoint="shop")["checkpoint"] == "v1"
    with pytest.raises(NotFoundError, match="'v2' is not deployed"):
        served.ask(checkpoint="v2")
    served.loading.fails.clear()
    served.loading.gate.clear()
    served.set("shop=v2")  # the same again
    served.wait(lambda status: status["loading"] == "v2")
    assert served.status["refused"] is None, "it may be in effect soon"
    served.loading.gate.set()
    served.wait(lambda status: status["aliases"] == {"shop": {"v2": 1.0}})
    assert (served.status["failed"], served.status["problem"], served.status["refused"]) == ({}, "", None)
    assert served.loading.did[-1] == "v2"


def test_a_new_try_that_is_asked_for_while_a_load_is_failing_comes_after_it(served: Served) -> None:
    class Once(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            return self.pop(name)

    served.loading.fails = Once(v2="a file is missing")
    served.loading.gate.clear()
    served.export("v2")
    served.wait(lambda status: status["loading"] == "v2")
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"])
    served.loading.gate.set()
    told = list[object]()

    def is_there(status: dict[str, Any]) -> bool:
        told.append(status["failed"])
        return "v2" in status["checkpoints"]

    served.wait(is_there)
    assert not any(told), "the failure is of what there was before"


def test_a_decision_does_not_wait_for_a_load_and_a_load_is_waited_for_by_its_table(served: Served) -> None:
    served.export("v2")
    served.wait(lambda status: "v2" in status["checkpoints"])
    served.set("shop=v2")
    served.wait(lambda status: status["aliases"])
    served.loading.gate.clear()
    served.export("v3")
    served.wait(lambda status: status["loading"] == "v3")
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"] == {"shop": {"v1": 1.0}})
    served.set("shop=v3")
    served.wait(lambda status: status["problem"])
    served.export("v4")  # while the other one is being loaded
    assert served.info(checkpoint="shop")["checkpoint"] == "v1"
    served.loading.gate.set()
    served.wait(lambda status: status["aliases"] == {"shop": {"v3": 1.0}})
    served.wait(lambda status: "v4" in status["checkpoints"])
    assert served.loading.did == ["v2", "v3", "v4"]


@pytest.mark.parametrize("text", ["{", "", "null", '{"format_version": 9, "aliases": {}, "default": null}', "[" * 9000])
def test_a_broken_table_is_refused_and_the_old_one_stays(served: Served, text: str) -> None:
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"])
    served.write("rollout.json", text)
    status = served.wait(lambda status: status["problem"])
    assert status["aliases"] == {"shop": {"v1": 1.0}}
    assert served.info(checkpoint="shop")["alias"] == "shop"
    served.write("rollout.json", RolloutTable({"new": Alias.new({"v1": 1})}).to_json())
    assert served.wait(lambda status: not status["problem"])["aliases"] == {"new": {"v1": 1.0}}


def test_a_broken_list_of_checkpoints_changes_nothing(served: Served) -> None:
    for text in ("{", '{"format_version": 9, "checkpoints": ["v2"]}', '{"format_version": 1, "checkpoints": 5}'):
        served.write("deployment.json", text)
        served.wait(lambda status: "deployment.json" in status["failed"])
        assert served.info()["checkpoint"] == "v1"
        (served.root / "deployment.json").unlink()
        served.wait(lambda status: "No such file" in status["failed"].get("deployment.json", ""))
    served.write("deployment.json", json.dumps({"format_version": 1, "checkpoints": ["v1", "../x", "gone"]}))
    status = served.wait(lambda status: len(status["failed"]) == 2)
    assert "is no name" in status["failed"]["../x"]
    assert "manifest.json" in status["failed"]["gone"]


def test_an_export_under_an_alias_s_name_is_not_served(served: Served) -> None:
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"])
    served.export("shop")
    assert "an alias has this name" in served.wait(lambda status: status["failed"])["failed"]["shop"]
    assert served.info(checkpoint="shop")["checkpoint"] == "v1"


def test_the_table_holds_from_the_start(served: Served) -> None:
    served.set("shop=v1", default="shop")
    served.service.close()
    served.service = served.start()
    info = served.info()
    assert (info["alias"], info["checkpoint"]) == ("shop", "v1")


def test_requests_under_way_end_with_the_checkpoint_that_they_began_with(served: Served) -> None:
    served.export("v2")
    served.wait(lambda status: "v2" in status["checkpoints"])
    served.set("shop=v1")
    served.wait(lambda status: status["aliases"])
    reply, go_on = served.held(checkpoint="shop", steps=4)
    served.set("shop=v2")
    served.wait(lambda status: status["aliases"] == {"shop": {"v2": 1.0}})
    after = served.ask(checkpoint="shop", steps=4)
    go_on.set()
    assert (reply.wait().events[-1].info["checkpoint"], after.wait().events[-1].info["checkpoint"]) == ("v1", "v2")
