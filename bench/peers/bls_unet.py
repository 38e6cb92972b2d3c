"""(c1) The UNet behind Triton's dynamic batcher: all requests that it hands over run as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from diffuserve.onnx_component import OnnxComponentModel

__all__ = ["BatchedUnet"]


class BatchedUnet(OnnxComponentModel):
    """Joins the requests' rows, runs the graph once, and parts its output again."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        try:
            feeds = [self._arrays(request) for request in requests]
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name, _, _ in self.inputs}
            (output,) = self.session.run(["model_output"], joined)
            ends = np.cumsum([len(feed["sample"]) for feed in feeds])
            parts = np.split(output, ends[:-1])
            return [pb_utils.InferenceResponse([pb_utils.Tensor("model_output", part)]) for part in parts]
        except Exception as error:
            failed = pb_utils.TritonError(f"the batch failed: {error}")
            return [pb_utils.InferenceResponse(output_tensors=[], error=failed) for _ in requests]

    def _arrays(self, request: Any) -> dict[str, Any]:
        arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name, _, _ in self.inputs}
        return {**arrays, "timestep": arrays["timestep"].reshape(-1)}
