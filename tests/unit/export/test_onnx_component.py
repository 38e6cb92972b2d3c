"""The component model inside Triton, with a stand-in for the module that Triton's stub provides."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import ComponentFailedError, InvalidArgumentError, from_wire
from unit.export.conftest import Exported


@dataclass
class Tensor:
    name: str
    array: np.ndarray[Any, Any]

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.array


@dataclass
class Request:
    tensors: dict[str, np.ndarray[Any, Any]]
    outputs: Sequence[str] = ("model_output",)

    def requested_output_names(self) -> Sequence[str]:
        return self.outputs


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: Any = None


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.tensors[name]) if name in request.tensors else None


@pytest.fixture
def component_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stub = ModuleType("triton_python_backend_utils")
    for name, value in (
        ("Tensor", Tensor),
        ("InferenceResponse", Response),
        ("TritonError", str),
        ("get_input_tensor_by_name", get_input_tensor_by_name),
    ):
        setattr(stub, name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    monkeypatch.delitem(sys.modules, "diffuserve.onnx_component", raising=False)
    yield importlib.import_module("diffuserve.onnx_component").OnnxComponentModel
    sys.modules.pop("diffuserve.onnx_component", None)


def arguments(folder: Path, threads: str = "1") -> dict[str, str]:
    config = {"parameters": {"intra_op_num_threads": {"string_value": threads}}}
    return {
        "model_name": folder.name,
        "model_repository": str(folder),
        "model_version": "1",
        "model_config": json.dumps(config),
    }


@pytest.fixture
def unet(component_class: Any, exported: Exported) -> Any:
    model = component_class()
    model.initialize(arguments(exported.out / "models" / "tiny_unet"))
    return model


def unet_tensors(rows: int = 2, height: int = 4, width: int = 6) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((rows, 4, height, width), dtype=np.float32),
        "timestep": np.full(rows, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 16), dtype=np.float32),
    }


def error_of(response: Response) -> Any:
    assert response.output_tensors == []
    error = from_wire(response.error)
    assert error is not None
    assert "tiny_unet" in error.message
    return error


def test_requests_are_answered_each_by_itself(unet: Any) -> None:
    bad = unet_tensors()
    del bad["timestep"]
    first, second, third = unet.execute([Request(unet_tensors()), Request(bad), Request(unet_tensors(5, 8, 4))])
    assert [(one.name, one.array.shape) for one in first.output_tensors] == [("model_output", (2, 4, 4, 6))]
    assert first.output_tensors[0].array.dtype == np.float32
    assert isinstance(error_of(second), InvalidArgumentError)
    assert third.output_tensors[0].array.shape == (5, 4, 8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((2, 5, 4, 6), np.float32)}, "takes sample as float32 [rows=2, 4, "),
        ({"sample": np.zeros((4, 4, 6), np.float32)}, "not float32 [4, 4, 6]"),
        ({"sample": np.zeros((2, 4, 4, 6), np.float64)}, "not float64"),
        ({"sample": np.zeros((0, 4, 4, 6), np.float32)}, "not float32 [0, 4, 4, 6]"),
        ({"timestep": np.zeros(1, np.float32)}, "takes timestep as float32 [rows=2], not float32 [1]"),
        ({"encoder_hidden_states": np.zeros((3, 77, 16), np.float32)}, "[rows=2, "),
    ],
)
def test_wrong_tensors_are_refused(unet: Any, change: dict[str, np.ndarray[Any, Any]], message: str) -> None:
    (response,) = unet.execute([Request({**unet_tensors(), **change})])
    error = error_of(response)
    assert isinstance(error, InvalidArgumentError)
    assert message in error.message
    assert error.detail["input"] in change


def test_whatever_onnx_runtime_says_is_an_answer(unet: Any) -> None:
    # An odd side passes the check of names and fails where the UNet joins its two halves.
    (odd, unknown) = unet.execute([Request(unet_tensors(height=5)), Request(unet_tensors(), outputs=("nothing",))])
    assert isinstance(error_of(odd), ComponentFailedError)
    assert isinstance(error_of(unknown), ComponentFailedError)
    (again,) = unet.execute([Request(unet_tensors())])
    assert again.error is None


def test_only_the_requested_outputs_are_given(component_class: Any, exported: Exported) -> None:
    model = component_class()
    model.initialize(arguments(exported.out / "models" / "tiny_text_encoder", threads="0"))
    inputs = {
        "input_ids": np.full((1, 77), 49407, np.int32),
        "clip_skip": np.zeros(1, np.int32),
        "embeddings": np.zeros((1, 16), np.float32),
    }
    (response,) = model.execute([Request(inputs, outputs=("pooled",))])
    assert response.error is None
    assert [(one.name, one.array.shape) for one in response.output_tensors] == [("pooled", (1, 16))]
    model.finalize()


def test_a_graph_that_does_not_load(component_class: Any, tmp_path: Path) -> None:
    folder = tmp_path / "broken_unet"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ComponentFailedError, match=r"broken_unet cannot load model\.onnx"):
        component_class().initialize(arguments(folder))


def test_the_generated_model_names_the_class(exported: Exported, component_class: Any) -> None:
    source = (exported.out / "models" / "tiny_unet" / "1" / "model.py").read_text()
    scope: dict[str, Any] = {}
    exec(compile(source, "model.py", "exec"), scope)
    assert scope["TritonPythonModel"] is component_class


def test_it_loads_no_torch() -> None:
    code = (
        "import sys, types; sys.modules['triton_python_backend_utils'] = types.ModuleType('stub'); "
        "import diffuserve.onnx_component; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
