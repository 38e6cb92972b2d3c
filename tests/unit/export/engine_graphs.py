"""A graph so small that TensorRT-RTX builds it in a second, and requests to build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffuserve.manifest import TensorShape
from diffuserve.profiles import Profile, Range
from diffuserve_export.engines import EngineRequest
from diffuserve_export.engines.device import builder_version

SAMPLE = TensorShape("sample", "FP32", ("rows", 4, "latent_height", "latent_width"))


def convolution(path: Path, height: int | str = "latent_height") -> Path:
    """`sample` through one convolution."""
    weights = np.random.default_rng(3).standard_normal((4, 4, 1, 1), dtype=np.float32)
    shape: list[str | int | None] = ["rows", 4, height, "latent_width"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["sample", "weights"], ["model_output"])],
        "convolution",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def box(rows: int, side: int) -> Profile:
    sides = {"latent_height": Range(2, side, side), "latent_width": Range(2, side, side)}
    return Profile({"rows": Range(1, rows, rows), **sides})


def request(**changes: Any) -> EngineRequest:
    facts: dict[str, Any] = {
        "target": "tensorrt-rtx",
        "version": builder_version("tensorrt-rtx"),
        "precision": "fp32",
        "inputs": (SAMPLE,),
        "profiles": (box(8, 4), box(2, 8)),
        "capabilities": ("8.9",),
        "device": "any",
    }
    return EngineRequest(**{**facts, **changes})
