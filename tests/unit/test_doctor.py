"""What the doctor says of a machine without a GPU, and of cards whose NVML answers are written down in nvml/."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from diffuserve import doctor
from diffuserve.doctor import Level, Machine, diagnose, read_machine, verdict
from diffuserve.gpu import GpuError, read_driver, read_gpus
from diffuserve.manifest import Component, Deployment
from diffuserve.profiles import EngineFacts, Profile, Range
from diffuserve.spec import UNET
from diffuserve_client._command import app
from unit.fakes import write_deployment

ANSWERS = Path(__file__).parent / "nvml"


class FakeNvml:
    """pynvml's functions, answering what a file says."""

    class NVMLError(Exception):
        pass

    def __init__(self, name: str) -> None:
        self.answers: dict[str, Any] = json.loads((ANSWERS / f"{name}.json").read_text())
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return str(self.answers["driver"])

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return int(self.answers["cuda"])

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.answers["gpus"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        assert self.open
        return self.answers["gpus"][index]

    def nvmlDeviceGetName(self, handle: Any) -> bytes:  # noqa: N802
        return str(handle["name"]).encode()  # older releases answer in bytes

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:  # noqa: N802
        return tuple(handle["capability"])

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=handle["total"], free=handle["free"])


class NoDriver(FakeNvml):
    """The package on a machine without a GPU."""

    def __init__(self) -> None:
        super().__init__("a100")

    def nvmlInit(self) -> None:  # noqa: N802
        raise self.NVMLError("Driver Not Loaded")


def machine(name: str, **more: Any) -> Machine:
    nvml = FakeNvml(name)
    given = {"tensorrt": "10.13.3", "tensorrt_rtx": "1.7.1.116", "triton": "2.60.0", "onnxruntime": "1.32.0"}
    found = Machine(gpus=read_gpus(nvml), driver=read_driver(nvml), shm_bytes=1 << 30, **{**given, **more})
    assert nvml.open == 0
    return found


def deployment(root: Path, builder: str = "tensorrt-rtx", **changes: Any) -> Deployment:
    """One checkpoint whose UNet needs 10 GB of weights and 5 GB of activations."""
    written = write_deployment(root, "x")
    given = {"version": "1.7.1.116" if builder == "tensorrt-rtx" else "10.13.3", "devices": ("8.9",), **changes}
    profile = Profile({"rows": Range(1, 8, 64)}, 5_000_000_000)
    engine = EngineFacts(
        builder=builder,
        precision="fp16",
        profiles=(profile,),
        onnx_sha256="",
        sha256="",
        **{"bytes": 10_000_000_000, **given},
    )
    manifest = written.manifest("x")
    unet = Component("x_unet", (), (), "", 0, engine=engine)
    changed = dataclasses.replace(manifest, target=builder, components={**manifest.components, UNET: unet})
    (written.folder("x") / "manifest.json").write_text(changed.to_json())
    return written


def lines(found: Machine, deployed: Deployment | None = None) -> list[str]:
    return [f"{one.level.value} {one.topic}: {one.text}" for one in diagnose(found, deployed)]


def test_an_rtx_4090(tmp_path: Path) -> None:
    assert lines(machine("rtx4090"), deployment(tmp_path)) == [
        "ok driver: 580.76.05, for CUDA up to 13.0",
        "ok GPU: NVIDIA GeForce RTX 4090, compute capability 8.9, 25.2 of 25.8 GB free: "
        "good for tensorrt, tensorrt-rtx and onnxruntime; fp16, int8, bf16, fp8 in hardware",
        "ok targets: this machine serves onnxruntime-cpu, onnxruntime, tensorrt, tensorrt-rtx; "
        "it builds tensorrt-rtx 1.7.1.116 engines for other cards with --compute-capability",
        "ok Triton: 2.60.0",
        "ok shared memory: /dev/shm has 1.07 GB",
        "ok checkpoint x: tensorrt-rtx in fp32 runs here",
        "ok memory: the deployment needs 15.0 GB (x 15.0), and NVIDIA GeForce RTX 4090 has 25.8",
    ]


def test_an_a100(tmp_path: Path) -> None:
    found = lines(machine("a100"), deployment(tmp_path))
    assert "fp16, int8, bf16 in hardware" in found[1]
    assert found[5:] == [
        "problem checkpoint x: tensorrt-rtx engine: it was built for compute capability 8.9, and this GPU has 8.0; "
        "export again for 8.0",
        "ok memory: the deployment needs 15.0 GB (x 15.0), and NVIDIA A100-SXM4-80GB has 85.9",
    ]


def test_a_v100_is_too_old(tmp_path: Path) -> None:
    found = lines(machine("v100"), deployment(tmp_path, "tensorrt", devices=("7.0",), bytes=13_000_000_000))
    assert found[0].startswith("problem driver: 535.183.01, for CUDA up to 12.2; CUDA 13.0 is needed")
    assert found[1].startswith("problem GPU: Tesla V100")
    assert "too old for TensorRT 10 and later: use the target onnxruntime" in found[1]
    assert found[2].startswith("ok targets: this machine serves onnxruntime-cpu, onnxruntime;")
    assert found[-1].startswith("problem memory: the deployment needs 18.0 GB")


@pytest.mark.parametrize(
    ("capability", "level", "part"),
    [
        ("7.0", Level.PROBLEM, "too old"),
        ("7.5", Level.OK, "tensorrt, tensorrt-rtx and onnxruntime; fp16, int8 in"),
        ("8.0", Level.OK, "tensorrt, tensorrt-rtx and onnxruntime; fp16, int8, bf16 in"),
        ("9.0", Level.OK, "good for tensorrt and onnxruntime; fp16, int8, bf16, fp8 in"),
        ("12.0", Level.OK, "tensorrt, tensorrt-rtx and onnxruntime; fp16, int8, bf16, fp8 in"),
    ],
    ids=["V100", "T4", "A100", "H100", "RTX 5090"],
)
def test_verdicts(capability: str, level: Level, part: str) -> None:
    found, text = verdict(capability)
    assert found is level
    assert part in text


@pytest.mark.parametrize(
    ("more", "changes", "reason"),
    [
        ({"tensorrt_rtx": "1.8.0"}, {}, "it was built with tensorrt-rtx 1.7.1.116, and 1.8.0 is here"),
        ({"tensorrt_rtx": None}, {}, "tensorrt-rtx is not installed, and 1.7.1.116 is needed"),
        ({}, {"builder": "tensorrt", "version": "10.9.0"}, "it was built with tensorrt 10.9.0, and 10.13.3 is here"),
    ],
)
def test_versions_are_compared_with_the_engines(
    tmp_path: Path, more: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    found = lines(machine("rtx4090", **more), deployment(tmp_path, **changes))
    assert any(line.startswith("problem checkpoint x") and reason in line for line in found)


def test_little_memory_left_is_noted_and_little_shared_memory_is_a_problem(tmp_path: Path) -> None:
    card = machine("rtx4090")
    busy = dataclasses.replace(card.gpus[0], free_bytes=2_000_000_000)
    found = lines(dataclasses.replace(card, gpus=(busy,), shm_bytes=64 << 20), deployment(tmp_path))
    assert found[-1].startswith("note memory: the deployment needs 15.0 GB")
    assert "of which 2.0 are free" in found[-1]
    assert "problem shared memory: /dev/shm has 0.07 GB, and 0.27 GB are needed: start with --shm-size=1g" in found


def test_without_a_gpu_it_says_what_works() -> None:
    found = lines(Machine(no_gpu="no NVIDIA driver", onnxruntime="1.32.0", tensorrt_rtx="1.7.1", shm_bytes=1 << 30))
    assert found[0] == "note driver: there is no GPU: no NVIDIA driver"
    assert found[1].startswith("ok targets: this machine serves onnxruntime-cpu; it builds tensorrt-rtx 1.7.1 engines")
    nothing = lines(Machine(no_gpu="no NVIDIA driver"))
    assert "problem targets: this machine serves none: install onnxruntime" in nothing


def test_without_a_gpu_a_gpu_deployment_cannot_be_served(tmp_path: Path) -> None:
    found = lines(Machine(no_gpu="none", shm_bytes=1 << 30), deployment(tmp_path))
    assert found[-1] == "problem checkpoint x: its target tensorrt-rtx needs a GPU, and there is none"


def test_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvinfer.so.10.13.3").touch()
    found = read_machine(FakeNvml("a100"), shm=tmp_path, libraries=[tmp_path])
    assert found.tensorrt == "10.13.3"
    assert [gpu.capability for gpu in found.gpus] == ["8.0"]
    assert found.onnxruntime
    assert found.shm_bytes > 0

    without = read_machine(NoDriver(), shm=tmp_path / "none", libraries=[])
    assert (without.gpus, without.no_gpu, without.shm_bytes) == ((), "no NVIDIA driver: Driver Not Loaded", 0)


def test_a_driver_without_gpus_is_told() -> None:
    nvml = FakeNvml("a100")
    nvml.answers["gpus"] = []
    with pytest.raises(GpuError, match="sees no GPU"):
        read_gpus(nvml)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_the_command_prints_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment(tmp_path)
    monkeypatch.setattr(doctor, "read_machine", lambda: machine("rtx4090"))
    result = run("--deployment", str(tmp_path))
    assert result.exit_code == 0
    assert "ok       checkpoint x: tensorrt-rtx in fp32 runs here" in result.output
    found = json.loads(run("--json").output)
    assert {one["level"] for one in found} == {"ok"}
    monkeypatch.setattr(doctor, "read_machine", lambda: machine("v100"))
    assert run().exit_code == 1


@pytest.fixture
def enough_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 30))


@pytest.mark.usefixtures("enough_shared_memory")
@pytest.mark.parametrize(
    ("nvml", "reason"),
    [(NoDriver(), "no NVIDIA driver: Driver Not Loaded"), (None, "nvidia-ml-py is not installed: pip install")],
    ids=["no driver", "no package"],
)
def test_the_command_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    result = run()
    assert result.exit_code == 0, result.output
    assert f"note     driver: there is no GPU: {reason}" in result.output
    assert "ok       targets: this machine serves onnxruntime-cpu;" in result.output
    deployment(tmp_path)
    result = run("--deployment", str(tmp_path))
    assert result.exit_code == 1
    assert "problem  checkpoint x: its target tensorrt-rtx needs a GPU, and there is none" in result.output


@pytest.mark.usefixtures("enough_shared_memory")
@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB, compute capability 8.0"),
        ("rtx4090", "NVIDIA GeForce RTX 4090, compute capability 8.9"),
    ],
)
def test_the_command_asks_nvml(monkeypatch: pytest.MonkeyPatch, name: str, card: str) -> None:
    nvml = FakeNvml(name)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    result = run()
    assert result.exit_code == 0, result.output
    assert f"ok       GPU: {card}" in result.output
    assert nvml.open == 0


def test_the_command_on_a_folder_that_is_no_deployment(tmp_path: Path) -> None:
    result = run("--deployment", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be read" in result.output
