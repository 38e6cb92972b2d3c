"""The TensorRT-RTX component model inside Triton, with stand-ins for Triton's module, TensorRT-RTX and the GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffuserve.engine_files import ENGINE_FILE, FACTS_FILE
from diffuserve.engine_session import EngineSession
from diffuserve.errors import ComponentFailedError, InvalidArgumentError, from_wire
from diffuserve.profiles import EngineFacts, Profile, Range
from unit import fake_tensorrt
from unit.fake_backend import Tensor


@dataclasses.dataclass
class Request:
    tensors: dict[str, torch.Tensor]
    outputs: Sequence[str] = ("model_output",)

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, tensor) for name, tensor in self.tensors.items()]

    def requested_output_names(self) -> Sequence[str]:
        return self.outputs


@dataclasses.dataclass
class Response:
    output_tensors: list[Tensor] = dataclasses.field(default_factory=list)
    error: Any = None


@pytest.fixture
def component(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stub = ModuleType("triton_python_backend_utils")
    for name, value in (("Tensor", Tensor), ("InferenceResponse", Response), ("TritonError", str)):
        setattr(stub, name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt)
    monkeypatch.delitem(sys.modules, "diffuserve.rtx_component", raising=False)
    module = importlib.import_module("diffuserve.rtx_component")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(
        module, "EngineSession", lambda package, engine, device: EngineSession(package, engine, torch.device("cpu"))
    )
    yield module.RtxComponentModel()
    sys.modules.pop("diffuserve.rtx_component", None)


def write_model(folder: Path, **changes: Any) -> dict[str, str]:
    engine = fake_tensorrt.plan(([1, 1], [8, 2]))
    (folder / "1").mkdir(parents=True)
    (folder / "1" / ENGINE_FILE).write_bytes(engine)
    given = {"version": fake_tensorrt.__version__, "devices": ("8.9",), "bytes": len(engine), **changes}
    facts = EngineFacts(
        builder="tensorrt-rtx",
        precision="fp32",
        profiles=(Profile({"rows": Range(1, 8, 8)}, 512),),
        onnx_sha256="",
        sha256="",
        **given,
    )
    (folder / "1" / FACTS_FILE).write_text(json.dumps(dataclasses.asdict(facts)))
    return {
        "model_name": folder.name,
        "model_repository": str(folder),
        "model_version": "1",
        "model_instance_device_id": "0",
    }


def feed(rows: int) -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(rows, 2), "timestep": torch.zeros(rows)}


def test_it_answers_each_request(component: Any, tmp_path: Path) -> None:
    component.initialize(write_model(tmp_path / "x_unet"))
    good, bad, unknown = feed(3), feed(9), Request(feed(1), outputs=("nothing",))
    answers = component.execute([Request(good), Request(bad), unknown, Request(good)])
    for index in (0, 3):
        (tensor,) = answers[index].output_tensors
        assert tensor.name() == "model_output"
        torch.testing.assert_close(tensor.tensor, good["sample"] * 2)
    error = from_wire(answers[1].error)
    assert isinstance(error, InvalidArgumentError)
    assert error.message.startswith("x_unet: no profile of the engine takes")
    assert error.detail["component"] == "x_unet"
    assert isinstance(from_wire(answers[2].error), ComponentFailedError)
    component.finalize()
    assert not hasattr(component, "session")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"version": "1.6.0"},
            r"cannot use its engine: it was built with tensorrt-rtx 1\.6\.0, and 1\.7\.1\.116",
        ),
        ({"devices": ("8.0", "12.0")}, r"for compute capability 8\.0 and 12\.0, and this GPU has 8\.9"),
        ({"bytes": 5}, "and 5 were written"),
    ],
)
def test_an_engine_of_another_version_or_card_does_not_load(
    component: Any, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ComponentFailedError, match=reason):
        component.initialize(write_model(tmp_path / "x_unet", **changes))


def test_a_missing_engine_or_package_does_not_load(
    component: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write_model(tmp_path / "x_unet")
    (tmp_path / "x_unet" / "1" / ENGINE_FILE).unlink()
    with pytest.raises(ComponentFailedError, match="it has 0 bytes"):
        component.initialize(arguments)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ComponentFailedError, match=r"pip install 'diffuserve\[tensorrt-rtx\]'"):
        component.initialize(arguments)
