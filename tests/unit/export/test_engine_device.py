"""Which card engines are built for, and with what."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from diffuserve.gpu import Gpu, GpuError
from diffuserve_export import ExportError, OptionError
from diffuserve_export.engines import EngineOptions, device
from diffuserve_export.engines.device import builder_facts, builder_version, engine_devices

ADA = EngineOptions(compute_capability="89")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[Gpu, ...]:
        raise GpuError("no NVIDIA driver")

    monkeypatch.setattr(device, "read_gpus", fail)


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_gpus", lambda: (Gpu("NVIDIA A100-SXM4-80GB", "8.0", 80 << 30, 79 << 30),))


def package(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_rtx_is_built_for_what_is_asked() -> None:
    assert engine_devices("tensorrt-rtx", ADA) == (("8.9",), "any")
    with pytest.raises(OptionError, match=r"no GPU to build for .*name the cards with --compute-capability"):
        engine_devices("tensorrt-rtx", EngineOptions())
    with pytest.raises(OptionError, match=r"builds on the card that it runs on: export there, or use .* tensorrt-rtx"):
        engine_devices("tensorrt", EngineOptions())


@pytest.mark.usefixtures("a100")
def test_a_plan_is_for_the_very_card() -> None:
    assert engine_devices("tensorrt", EngineOptions()) == (("8.0",), "NVIDIA A100-SXM4-80GB")
    assert engine_devices("tensorrt-rtx", EngineOptions()) == (("8.0",), "any")
    assert engine_devices("tensorrt-rtx", ADA) == (("8.9",), "any")


def test_the_builder_must_be_there_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"needs the Python package tensorrt, .*pip install 'diffuserve\[tensorrt\]'"):
        builder_version("tensorrt")
    package("tensorrt", "8.6.1", monkeypatch)
    with pytest.raises(ExportError, match=r"tensorrt is 8\.6\.1, and 10\.0 or later is needed"):
        builder_version("tensorrt")
    for version in ("10.13.3", "11.4.0"):
        package("tensorrt", version, monkeypatch)
        assert builder_version("tensorrt") == version


def test_only_targets_with_engines_have_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    package("tensorrt_rtx", "1.7.1.116", monkeypatch)
    assert builder_facts("onnxruntime", EngineOptions()) == {}
    assert builder_facts("tensorrt-rtx", ADA) == {"version": "1.7.1.116", "devices": ("8.9",), "device": "any"}
