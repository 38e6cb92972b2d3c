"""A component model: one TensorRT-RTX engine on this instance's GPU, inside Triton's Python backend.

Export writes a `model.py` that names `RtxComponentModel`, with `model.plan` and `engine.json` beside it. Inputs and
outputs stay on the GPU: they come and go as DLPack.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from diffuserve.engine_files import ENGINE_FILE, read_facts, refusal
from diffuserve.engine_session import EngineSession
from diffuserve.errors import ComponentFailedError, DiffuserveError

__all__ = ["RtxComponentModel"]


class RtxComponentModel:
    """Triton's Python backend calls `initialize` once, `execute` for requests that wait, and `finalize` at the end."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine. Raises ComponentFailedError, which Triton reports as a model that does not load."""
        self.name = args["model_name"]
        folder = Path(args["model_repository"]) / args["model_version"]
        device = torch.device("cuda", int(args["model_instance_device_id"]))
        try:
            package = importlib.import_module("tensorrt_rtx")
        except ImportError as error:
            raise ComponentFailedError(
                f"{self.name} needs tensorrt_rtx: pip install 'diffuserve[tensorrt-rtx]'"
            ) from error
        self.session = self._open(package, folder, device)

    def _open(self, package: Any, folder: Path, device: torch.device) -> EngineSession:
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability(device)
        facts, path = read_facts(folder), folder / ENGINE_FILE
        size = path.stat().st_size if path.is_file() else 0
        if reason := refusal(facts, version=package.__version__, capability=f"{major}.{minor}", size=size):
            raise ComponentFailedError(f"{self.name} cannot use its engine: {reason}", component=self.name)
        return EngineSession(package, path.read_bytes(), device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, each with its outputs or with an error that names this component."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tensors = {one.name(): from_dlpack(one.to_dlpack()) for one in request.inputs()}
            outputs = self.session.run(tensors)
            wanted = [pb_utils.Tensor.from_dlpack(name, outputs[name]) for name in request.requested_output_names()]
            return pb_utils.InferenceResponse(output_tensors=wanted)
        except DiffuserveError as error:
            return _failure(type(error)(f"{self.name}: {error.message}", component=self.name, **error.detail))
        except Exception as error:  # a request must be answered, whatever happened
            return _failure(ComponentFailedError(f"{self.name} failed: {error!r}", component=self.name))

    def finalize(self) -> None:
        """Let go of the engine and its memory."""
        del self.session


def _failure(error: DiffuserveError) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error.to_wire()))
