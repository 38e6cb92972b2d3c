"""ONNX -> TensorRT and TensorRT-RTX engines, and the Triton models that serve them.

Importing this package loads neither TensorRT nor Polygraphy: engines are built in a process of their own, which
gives its memory back when it ends and says how much it took.
"""

from __future__ import annotations

from diffuserve_export.engines.build import EngineRequest, engine_from_onnx
from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.engines.profiles import engine_profiles

__all__ = ["EngineOptions", "EngineRequest", "engine_from_onnx", "engine_profiles"]
