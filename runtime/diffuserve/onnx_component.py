"""A component model: one ONNX graph in ONNX Runtime, on the CPU, inside Triton's Python backend.

Export writes a `model.py` that names `OnnxComponentModel`, with `model.onnx` beside it. No torch is imported here:
the process holds the graph and ONNX Runtime, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils

from diffuserve.errors import ComponentFailedError, DiffuserveError, InvalidArgumentError
from diffuserve.onnx_session import open_session

__all__ = ["OnnxComponentModel"]

_DTYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxComponentModel:
    """Triton's Python backend calls `initialize` once, `execute` for requests that wait, and `finalize` at the end."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the graph. Raises ComponentFailedError, which Triton reports as a model that does not load.

        The config's parameter `intra_op_num_threads` is the number of threads; 0 is one for each core.
        """
        self.name = args["model_name"]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = int(parameters.get("intra_op_num_threads", {}).get("string_value") or 0)
        try:
            self.session = open_session(path, threads)
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise ComponentFailedError(f"{self.name} cannot load {path.name}: {_first_line(error)}") from error
        self.inputs = [(one.name, tuple(one.shape), _DTYPES[one.type]) for one in self.session.get_inputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, each with its outputs or with an error that names this component."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            feed = self._feed(request)
            names = list(request.requested_output_names())
            arrays = self.session.run(names, feed)
            return pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(name, array) for name, array in zip(names, arrays, strict=True)]
            )
        except DiffuserveError as error:
            return _failure(error)
        except Exception as error:  # a request must be answered, whatever happened
            return _failure(ComponentFailedError(f"{self.name} failed: {_first_line(error)}", component=self.name))

    def _feed(self, request: Any) -> dict[str, Any]:
        """The request's arrays. A side that has a name must have one length in all inputs."""
        feed, sides = {}, dict[str, int]()
        for name, shape, dtype in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise InvalidArgumentError(f"{self.name} lacks its input {name}", component=self.name, input=name)
            array = tensor.as_numpy()
            fits = array.ndim == len(shape) and array.dtype == dtype and array.size > 0
            if not fits or not all(
                (sides.setdefault(side, length) if isinstance(side, str) else side) == length
                for side, length in zip(shape, array.shape, strict=True)
            ):
                raise InvalidArgumentError(
                    f"{self.name} takes {name} as {np.dtype(dtype).name} {_sides_text(shape, sides)}, "
                    f"not {array.dtype.name} {list(array.shape)}",
                    component=self.name,
                    input=name,
                )
            feed[name] = array
        return feed

    def finalize(self) -> None:
        """Let go of the graph."""
        self.session = None


def _sides_text(shape: Sequence[int | str], sides: Mapping[str, int]) -> str:
    known = [f"{side}={sides[side]}" if isinstance(side, str) and side in sides else str(side) for side in shape]
    return f"[{', '.join(known)}]"


def _failure(error: DiffuserveError) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error.to_wire()))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
