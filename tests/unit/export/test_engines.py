"""Engines that TensorRT-RTX really builds, what the cache takes and what it does not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffuserve.engine_files import ENGINE_FILE, FACTS_FILE, read_facts, refusal
from diffuserve.errors import ComponentFailedError
from diffuserve_export import ExportError
from diffuserve_export.engines import build, engine_from_onnx
from diffuserve_export.engines.build import EngineError, EngineRequest
from diffuserve_export.engines.profiles import tensor_shapes
from unit.export.engine_graphs import SAMPLE, box, convolution, request


@dataclasses.dataclass(frozen=True)
class Built:
    graph: Path
    cache: Path
    folder: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("engines")
    graph = convolution(root / "model.onnx")
    return Built(graph, root / "cache", engine_from_onnx(graph, request(), root / "cache", pytest.fail))


@pytest.fixture
def never_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("it was built again"))


def test_the_facts_say_what_was_built(shared: Built) -> None:
    facts = read_facts(shared.folder)
    assert (facts.builder, facts.precision, facts.devices) == ("tensorrt-rtx", "fp32", ("8.9",))
    assert facts.version == request().version
    assert facts.bytes == (shared.folder / ENGINE_FILE).stat().st_size > 0
    assert [one.sides["rows"].max for one in facts.profiles] == [8, 2]
    # 8 rows of 4 x 4, and 2 of 8 x 8, in 4 channels of float32 or what the kernel needs of them.
    assert all(one.activation_bytes >= 0 for one in facts.profiles)
    assert facts.build_peak_bytes > 1 << 20
    assert "Total Activation Memory" in (shared.folder / "build.log").read_text()
    assert {path.name for path in shared.cache.iterdir()} == {shared.folder.name}


def test_one_engine_is_built_for_several_cards(shared: Built, tmp_path: Path) -> None:
    capabilities = ("8.0", "8.9", "12.0")
    folder = engine_from_onnx(shared.graph, request(capabilities=capabilities), tmp_path / "cache", pytest.fail)
    facts = read_facts(folder)
    assert facts.devices == capabilities
    assert facts.bytes > read_facts(shared.folder).bytes


@pytest.mark.usefixtures("never_builds")
def test_the_same_is_built_once(shared: Built) -> None:
    assert engine_from_onnx(shared.graph, request(), shared.cache, pytest.fail) == shared.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "1.0.0.0"},
        {"precision": "fp16"},
        {"capabilities": ("8.6",)},
        {"device": "NVIDIA A100"},
        {"profiles": (box(4, 4),)},
        {"workspace_bytes": 1 << 20},
    ],
)
def test_whatever_decides_an_engine_is_in_its_key(changes: dict[str, object]) -> None:
    assert request(**changes).key("1") != request().key("1") != request().key("2")


def damage_a_byte(folder: Path) -> None:
    content = bytearray((folder / ENGINE_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / ENGINE_FILE).write_bytes(content)


def cut_short(folder: Path) -> None:
    (folder / ENGINE_FILE).write_bytes((folder / ENGINE_FILE).read_bytes()[:-10])


def claim(field: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / FACTS_FILE).read_text())
        (folder / FACTS_FILE).write_text(json.dumps({**facts, field: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_a_byte, "is damaged"),
        (cut_short, "is damaged"),
        (lambda folder: (folder / ENGINE_FILE).unlink(), "is not whole"),
        (lambda folder: (folder / FACTS_FILE).write_text("{"), "is not whole"),
        (claim("version", "1.0.0.0"), "has another version: 1.0.0.0"),
        (claim("devices", ["12.0"]), "has another devices"),
        (claim("onnx_sha256", "0"), "has another graph"),
    ],
)
def test_an_engine_that_is_not_the_right_one_is_built_again(
    shared: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str
) -> None:
    graph = convolution(tmp_path / "model.onnx")
    folder = tmp_path / "cache" / shared.folder.name
    copy_of(shared.folder, folder)
    damage(folder)

    def copy_instead(onnx: Path, request: EngineRequest, staging: Path, cache: Path) -> dict[str, object]:
        (staging / ENGINE_FILE).write_bytes((shared.folder / ENGINE_FILE).read_bytes())
        return {"activation_bytes": [1, 2], "seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(build, "_build", copy_instead)
    notes: list[str] = []
    assert engine_from_onnx(graph, request(), tmp_path / "cache", notes.append) == folder
    assert len(notes) == 1
    assert reason in notes[0]
    assert (folder / ENGINE_FILE).read_bytes() == (shared.folder / ENGINE_FILE).read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def copy_of(folder: Path, to: Path) -> None:
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def test_a_profile_outside_the_graphs_range_is_refused(tmp_path: Path) -> None:
    graph = convolution(tmp_path / "model.onnx", height=4)
    with pytest.raises(EngineError, match=r"profile 0 has sample \[1, 4, 2, 2\], and the graph takes \[-1, 4, 4, -1\]"):
        engine_from_onnx(graph, request(), tmp_path / "cache", pytest.fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_tensorrt_says_of_a_broken_graph_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"tensorrt-rtx .* refuses"):
        engine_from_onnx(tmp_path / "model.onnx", request(), tmp_path / "cache", pytest.fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_builder_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(EngineError, match="ended by signal 9; it may have run out of memory"):
        engine_from_onnx(convolution(tmp_path / "model.onnx"), request(), tmp_path / "cache", pytest.fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_tensorrt_is_driven_up_to_where_a_gpu_is_needed(tmp_path: Path) -> None:
    """With TensorRT-RTX under TensorRT's name: network, profiles, workspace, timing cache and build."""
    profiles = [tensor_shapes((SAMPLE,), one) for one in request().profiles]
    job = {"onnx": str(convolution(tmp_path / "model.onnx")), "folder": str(tmp_path), "profiles": profiles}
    limits = {"capabilities": [[8, 9]], "workspace_bytes": 1 << 28, "timing_cache": str(tmp_path / "timings.bin")}
    (tmp_path / "job.json").write_text(json.dumps({**job, **limits, "parent": os.getpid()}))
    folder = Path(__file__).parent / "stand_in"
    environment = {**os.environ, "PYTHONPATH": str(folder), "POLYGRAPHY_USE_TENSORRT_RTX": "0"}
    command = [sys.executable, "-m", "diffuserve_export.engines.builder", str(tmp_path / "job.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "STRONGLY_TYPED" in run.stdout
    assert "WORKSPACE: 256.00 MiB" in run.stdout
    assert (tmp_path / "model.plan").stat().st_size > 0
    assert (tmp_path / "timings.bin").stat().st_size > 0
    error = json.loads((tmp_path / "result.json").read_text()).get("error", "deserializeCudaEngine")
    assert "deserializeCudaEngine" in error


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"version": "1.7.2"}, "it was built with tensorrt-rtx 1.7.1.116, and 1.7.2 is here; export again with 1.7.2"),
        ({"version": "1.7.1.200"}, ""),
        ({"capability": "8.0"}, "it was built for compute capability 8.9, and this GPU has 8.0; export again for 8.0"),
        ({"size": 7}, "it has 7 bytes, and"),
    ],
)
def test_a_foreign_engine_is_refused_with_the_reason(shared: Built, change: dict[str, str], reason: str) -> None:
    facts = dataclasses.replace(read_facts(shared.folder), version="1.7.1.116")
    here = {"version": "1.7.1.116", "capability": "8.9", "size": facts.bytes, **change}
    assert refusal(facts, **here).startswith(reason)  # type: ignore[arg-type]
    assert bool(refusal(facts, **here)) == bool(reason)  # type: ignore[arg-type]


def test_facts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ComponentFailedError, match=r"engine\.json cannot be read"):
        read_facts(tmp_path)


def test_an_engine_error_is_an_export_error() -> None:
    assert issubclass(EngineError, ExportError)
    assert EngineError.exit_code == 1


@pytest.mark.parametrize(("opens", "told"), [(True, [7, 11]), (False, [1, 2])])
def test_what_an_engine_says_of_itself_is_kept_where_a_gpu_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool, told: list[int]
) -> None:
    monkeypatch.setattr("polygraphy.config.USE_TENSORRT_RTX", True)
    builder = importlib.import_module("diffuserve_export.engines.builder")
    inspector = SimpleNamespace(get_engine_information=lambda _: '{"Layers": []}')
    engine = SimpleNamespace(
        create_engine_inspector=lambda: inspector, get_device_memory_size_for_profile_v2=lambda index: (7, 11)[index]
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine if opens else None)
    stand_in = SimpleNamespace(Runtime=lambda _: runtime, LayerInformationFormat=SimpleNamespace(JSON=1))
    monkeypatch.setattr(builder, "trt", stand_in)
    monkeypatch.setattr(builder, "_GPU_DEVICE", tmp_path)
    listener: Any = SimpleNamespace(activation_bytes=[1, 2])
    assert builder._inspect(b"", tmp_path, listener, 2) == told
    assert [path.name for path in tmp_path.iterdir()] == (["inspector.json"] if opens else [])
