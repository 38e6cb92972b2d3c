"""The registry: files found as they come, read again as they change, held by recency within a budget."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffuserve.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from diffuserve.lora import folder as module
from diffuserve.lora.folder import CheckpointLoras, LoraFolder
from diffuserve.manifest import Manifest
from diffuserve.telemetry import Telemetry
from unit.fakes import component, write_deployment
from unit.lora.files import LAYOUTS, TO_Q, adapted, pair, put, tensors_of


class Counted(Telemetry):
    def __init__(self) -> None:
        self.hits, self.misses, self.most, self.held = 0, 0, 0, 0

    def lora(self, hit: bool, held_bytes: int) -> None:
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)
        self.most, self.held = max(self.most, held_bytes), held_bytes


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are whole here when they come; one test is about those that are not."""
    monkeypatch.setattr(module, "_SETTLED_S", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "loras"


def manifest(tmp_path: Path, **layouts: Any) -> Manifest:
    deployment = write_deployment(tmp_path / "deployment", "shapes")
    made = deployment.manifest("shapes")
    adapters = {name: adapted(component(name), layout) for name, layout in (layouts or LAYOUTS).items()}
    return replace(made, components={**made.components, **adapters})


def test_files_are_found_as_they_come_change_and_go(root: Path) -> None:
    telemetry = Counted()
    folder = LoraFolder(root, telemetry=telemetry)
    with pytest.raises(NotFoundError, match=r"loras names style, and there is no style\.safetensors"):
        folder.get("style", "shapes")
    path = put(root, "style")
    first = folder.get("STYLE", "shapes")
    assert folder.get("style", "shapes") is first
    put(root, "style", tensors_of(seed=2))
    second = folder.get("style", "shapes")
    assert second.digest != first.digest
    assert (telemetry.hits, telemetry.misses, telemetry.held) == (1, 2, second.bytes)
    path.unlink()
    with pytest.raises(NotFoundError):
        folder.get("style", "shapes")


def test_a_checkpoints_own_come_first(root: Path) -> None:
    put(root, "style")
    put(root / "large", "style", tensors_of(seed=2))
    folder = LoraFolder(root)
    assert folder.get("style", "shapes").digest != folder.get("style", "large").digest


def test_those_asked_for_last_are_held_within_the_budget(root: Path) -> None:
    for number in range(200):
        put(root, f"n{number}", tensors_of(seed=number))
    telemetry, size = Counted(), sum(one.nbytes for one in tensors_of().values())
    folder = LoraFolder(root, 20 * size, telemetry)
    digests = [folder.get(f"n{number}", "shapes").digest for number in range(200)]
    assert len(set(digests)) == 200
    assert (telemetry.misses, telemetry.hits, telemetry.most) == (200, 0, 20 * size)
    assert [folder.get(f"n{number}", "shapes").digest for number in range(180, 200)] == digests[180:]
    assert (telemetry.misses, telemetry.hits) == (200, 20)
    folder.get("n180", "shapes")  # the one that was asked for longest ago, but for this
    folder.get("n0", "shapes")
    folder.get("n180", "shapes")
    assert (telemetry.misses, telemetry.hits) == (201, 22)


def test_one_that_is_larger_than_the_budget_is_read_and_not_held(root: Path) -> None:
    put(root, "style")
    telemetry = Counted()
    folder = LoraFolder(root, 1, telemetry)
    assert folder.get("style", "shapes").digest == folder.get("style", "shapes").digest
    assert (telemetry.misses, telemetry.most) == (2, 0)


def test_it_is_read_once_for_all_who_ask_at_once(root: Path) -> None:
    put(root, "style")
    telemetry = Counted()
    folder = LoraFolder(root, telemetry=telemetry)
    with ThreadPoolExecutor(8) as pool:
        files = set(pool.map(lambda _: folder.get("style", "shapes"), range(8)))
    assert (len(files), telemetry.misses, telemetry.hits) == (1, 1, 7)


def test_a_file_that_is_being_written_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given its size at once looks whole before it is."""
    monkeypatch.setattr(module, "_SETTLED_S", 0.2)
    content = safetensors.torch.save(tensors_of())
    root.mkdir()
    path = root / "style.safetensors"
    half = len(content) - 32
    path.write_bytes(content[:half] + bytes(32))
    begun = threading.Event()

    def write() -> None:
        begun.wait()
        path.write_bytes(content)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write)
        waits = time.sleep

        def wait(seconds: float) -> None:
            begun.set()
            waits(seconds)

        monkeypatch.setattr(time, "sleep", wait)
        file = LoraFolder(root).get("style", "shapes")
    (found,) = file.modules.values()
    assert torch.equal(found.up, tensors_of()[f"unet.{TO_Q}.lora_B.weight"])


def test_one_that_is_written_without_an_end_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_S", 0.2)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    path = put(root, "style")
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(path) if seconds < 0.15 else None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    os.utime(path, (now, now))
    with pytest.raises(InvalidArgumentError, match="is being written; ask again when it is whole"):
        LoraFolder(root).get("style", "shapes")


def test_files_that_cannot_be_used_disturb_no_others(root: Path) -> None:
    put(root, "good")
    put(root.parent, "outside")
    (root / "outside.safetensors").symlink_to(root.parent / "outside.safetensors")
    (root / "large.safetensors").touch()
    os.truncate(root / "large.safetensors", 5 << 30)
    (root / "half.safetensors").write_bytes((root / "good.safetensors").read_bytes()[:-4])
    (root / "bomb.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    (root / "pickle.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    os.mkfifo(root / "pipe.safetensors")
    put(root, "nan", {key: tensor * float("nan") for key, tensor in tensors_of().items()})
    folder = LoraFolder(root)
    for name, said in (
        ("outside", "is a link out of the folder"),
        ("large", "has 5368709120 bytes, and at most 1073741824 are read"),
        ("half", "no safetensors file, or not whole"),
        ("bomb", "no safetensors file"),
        ("pickle", "is pickled, which can run code"),
        ("pipe", "is no file"),
        ("nan", "values that are not finite.*to_q"),
    ):
        with pytest.raises(InvalidArgumentError, match=said) as caught:
            folder.get(name, "shapes")
        assert caught.value.detail == {"input": "loras", "lora": name}
    assert folder.get("good", "shapes").modules


def test_equal_requests_share_an_adapter_as_long_as_it_is_used(root: Path, tmp_path: Path) -> None:
    put(root, "a")
    put(root, "b", tensors_of(seed=2))
    loras = CheckpointLoras(manifest(tmp_path), LoraFolder(root))
    first = loras.adapter(loras.read(["a:0.5", "b"]))
    assert first is not None
    assert loras.adapter(loras.read(["b:1", "A:0.5"])) is first
    assert loras.adapter(loras.read(["a:0.5", "b:-1"])) is not first
    assert sum(one.nbytes for one in first.vectors.values()) == LAYOUTS["unet"].size * 4
    assert loras.bytes == sum(layout.size * 4 for layout in LAYOUTS.values())
    del first
    assert not loras._alive


def test_a_weight_of_zero_is_none(root: Path, tmp_path: Path) -> None:
    put(root, "a")
    loras = CheckpointLoras(manifest(tmp_path), LoraFolder(root))
    assert loras.adapter(loras.read(["a:0"])) is None
    assert loras.adapter(loras.read([])) is None


def test_ranks_that_do_not_fit_are_refused_unless_they_may_be_truncated(root: Path, tmp_path: Path) -> None:
    put(root, "a", tensors_of(rank=3))
    put(root, "b", tensors_of(rank=2, seed=2))
    loras = CheckpointLoras(manifest(tmp_path), LoraFolder(root))
    with pytest.raises(
        InvalidArgumentError, match=r"loras a, b need a rank of 5 .*exported with 4.*b:0\.5:truncate"
    ) as e:
        loras.read(["a", "b:0.5"])
    assert (e.value.detail["value"], e.value.detail["maximum"]) == (5, 4)
    read = loras.read(["a", "b:0.5:truncate"])
    adapter = loras.adapter(read)
    assert adapter is not None
    told = adapter.told(read)
    assert 0 < told[1]["truncation_error"] < 1
    assert "truncation_error" not in told[0]


def test_a_file_that_changed_while_the_request_waited_is_not_another(root: Path, tmp_path: Path) -> None:
    put(root, "a")
    loras = CheckpointLoras(manifest(tmp_path), LoraFolder(root))
    read = loras.read(["a"])
    put(root, "a", tensors_of(seed=2))
    with pytest.raises(InvalidArgumentError, match="changed while the request waited; send it again"):
        loras.adapter(read)


def test_what_does_not_fit_the_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    down, up = pair(2, 7, 8)
    put(root, "wide", {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up})
    put(root, "other", tensors_of(layer="unet.elsewhere"))
    loras = CheckpointLoras(manifest(tmp_path), LoraFolder(root))
    for name, said in (("wide", rf"does not fit shapes: .*widths: {TO_Q}"), ("other", r"layers .*: unet\.elsewhere")):
        with pytest.raises(InvalidArgumentError, match=said):
            loras.read([name])


def test_a_checkpoint_without_adapters_takes_none(root: Path, tmp_path: Path) -> None:
    put(root, "a")
    plain = write_deployment(tmp_path / "plain", "shapes").manifest("shapes")
    loras = CheckpointLoras(plain, LoraFolder(root))
    assert (loras.read([]), loras.bytes) == ((), 0)
    with pytest.raises(UnsupportedError, match=r"shapes was exported without adapters, .* LORA_RANK, or leave"):
        loras.read(["a"])
