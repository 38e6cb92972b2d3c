"""What is told of the LoRAs that there are: by their headers alone, and in bounded time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffuserve.lora import catalog as module
from diffuserve.lora import folder as reading
from diffuserve.lora.catalog import LoraCatalog
from diffuserve.lora.files import parse_lora_file, parse_lora_header
from diffuserve.lora.folder import CheckpointLoras, LoraFolder
from unit.fakes import component, write_deployment
from unit.lora.files import LAYOUTS, TO_Q, adapted, put, tensors_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "loras"


@pytest.fixture
def clock() -> list[float]:
    """What the clock says, and how much later it is each time that it is asked."""
    return [0.0, 0.0]


@pytest.fixture
def catalog(tmp_path: Path, root: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> LoraCatalog:
    def now() -> float:
        clock[0] += clock[1]
        return clock[0]

    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    made = write_deployment(tmp_path / "deployment", "shapes").manifest("shapes")
    adapters = {name: adapted(component(name), layout) for name, layout in LAYOUTS.items()}
    folder = LoraFolder(root)
    return LoraCatalog("shapes", folder, CheckpointLoras(replace(made, components=adapters), folder), now)


def told(catalog: LoraCatalog, until: float = math.inf) -> tuple[tuple[str, ...], int]:
    one: dict[str, Any] = catalog.told(until)
    return one["loras"], one["loras_not_looked_at"]


def test_names_are_those_that_fit(catalog: LoraCatalog, root: Path) -> None:
    assert told(catalog) == ((), 0)
    put(root, "Night")
    put(root, "bar", tensors_of(rank=5))  # the checkpoint was built with 4
    put(root / "shapes", "own")
    put(root / "other", "elsewhere")
    put(root, "wide", {f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 7), f"unet.{TO_Q}.lora_B.weight": torch.ones(8, 2)})
    put(root, "foreign", tensors_of(layer="unet.elsewhere"))
    put(root, "double", {name: one.double() for name, one in tensors_of().items()})
    put(root, "twice")
    (root / "twice.bin").write_bytes(b"pickled")
    (root / "TWICE.safetensors").write_bytes((root / "twice.safetensors").read_bytes())
    (root / "cut.safetensors").write_bytes((root / "Night.safetensors").read_bytes()[:-1])
    (root / "text.safetensors").write_bytes(b"night")
    (root / "long.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    put(root, "odd", lora_adapter_metadata='{"unet.lora_alpha": null}')
    (root / "link.safetensors").symlink_to(put(root.parent / "outside", "link"))
    assert told(catalog) == (("bar:truncate", "Night", "own"), 0)
    (root / "Night.safetensors").unlink()
    (root / "wide.safetensors").replace(root / "bar.safetensors")
    assert told(catalog) == (("own",), 0)


def test_a_checkpoint_without_adapters_has_none(tmp_path: Path, root: Path) -> None:
    put(root, "night")
    folder = LoraFolder(root)
    manifest = write_deployment(tmp_path / "deployment", "shapes").manifest("shapes")
    assert told(LoraCatalog("shapes", folder, CheckpointLoras(manifest, folder))) == ((), 0)


def test_files_are_looked_at_once_and_only_by_their_headers(
    catalog: LoraCatalog, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(root, f"n{number}")
    looked, header = list[str](), LoraFolder.header

    def counted(self: LoraFolder, path: Path) -> Any:
        looked.append(path.stem)
        return header(self, path)

    monkeypatch.setattr(LoraFolder, "header", counted)
    monkeypatch.setattr(reading, "parse_lora_file", lambda content: pytest.fail("a whole file was read"))
    for _ in range(2):
        assert told(catalog) == (("n0", "n1", "n2"), 0)
    assert sorted(looked) == ["n0", "n1", "n2"]
    put(root, "n1", tensors_of(rank=5))
    assert told(catalog) == (("n0", "n1:truncate", "n2"), 0)
    assert looked[3:] == ["n1"]


def test_a_file_that_nobody_thought_of_leaves_the_others(
    catalog: LoraCatalog, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    header = LoraFolder.header

    def looked(self: LoraFolder, path: Path) -> Any:
        if path.stem == "odd":
            raise TypeError("of another kind")
        return header(self, path)

    monkeypatch.setattr(LoraFolder, "header", looked)
    for name in ("night", "odd"):
        put(root, name)
    assert told(catalog) == (("night",), 0)
    assert "odd.safetensors is left out" in caplog.text


def test_what_there_was_no_time_for_is_counted_and_comes_later(
    catalog: LoraCatalog, root: Path, clock: list[float]
) -> None:
    for number in range(5):
        put(root, f"n{number}")
    clock[1] = 1.0
    # Each look at a file asks the clock once, and so does each call.
    assert told(catalog, until=4.5) == (("n0", "n1", "n2"), 2)
    assert told(catalog, until=0.0) == (("n0", "n1", "n2"), 2), "less than was known is not told"
    assert told(catalog) == (("n0", "n1", "n2", "n3", "n4"), 0)


def test_many_are_told_within_bounds(catalog: LoraCatalog, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_NAMES", 3)
    monkeypatch.setattr(module, "MOST_LOOKED_AT", 5)
    for number in range(9):
        put(root, f"n{number}")
    assert told(catalog) == (("n0", "n1", "n2"), 6)
    for number in range(4):
        put(root, f"n{number}", tensors_of(layer="unet.elsewhere"))
    assert told(catalog) == (("n4",), 4)


def test_answers_are_kept_for_a_moment(
    catalog: LoraCatalog, root: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_S", 60.0)
    put(root, "night")
    assert told(catalog)[0] == ("night",)
    put(root, "bar")
    assert told(catalog)[0] == ("night",)
    clock[0] += 61
    assert told(catalog)[0] == ("bar", "night")


def test_a_header_tells_the_same_layers_as_the_file() -> None:
    alpha = {f"unet.{TO_Q}.alpha": torch.tensor(3.0)}
    content = safetensors.torch.save({**tensors_of(rank=3), **alpha})
    length = int.from_bytes(content[:8], "little")
    header, whole = parse_lora_header(content[: 8 + length], len(content)), parse_lora_file(content)
    (place,) = whole.modules
    assert header.modules.keys() == whole.modules.keys()
    assert header.modules[place].down.shape == whole.modules[place].down.shape
    assert header.modules[place].up.shape == whole.modules[place].up.shape
