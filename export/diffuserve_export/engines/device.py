"""What engines are built with and for: the installed TensorRT, and the GPU of this machine."""

from __future__ import annotations

import importlib
from typing import Any, Final

from diffuserve.gpu import Gpu, GpuError, read_gpus
from diffuserve_export.engines.options import TENSORRT, TENSORRT_RTX, EngineOptions
from diffuserve_export.errors import ExportError, OptionError

__all__ = ["builder_facts", "builder_version", "engine_devices"]

_MODULES: Final = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
_OLDEST: Final = {TENSORRT: 10, TENSORRT_RTX: 1}


def builder_facts(target: str, options: EngineOptions) -> dict[str, Any]:
    """What decides the engines of `target` besides their graphs; nothing where it has none.

    Raises ExportError or OptionError where they cannot be built here.
    """
    if target not in _MODULES:
        return {}
    devices, name = engine_devices(target, options)
    return {"version": builder_version(target), "devices": devices, "device": name}


def builder_version(target: str) -> str:
    """The version of the target's package. Raises ExportError where it is missing or too old."""
    name = _MODULES[target]
    try:
        version = str(importlib.import_module(name).__version__)
    except (ImportError, AttributeError, OSError) as error:
        raise ExportError(
            f"the target {target} needs the Python package {name}, which cannot be imported ({error}); "
            f"pip install 'diffuserve[{target}]'"
        ) from error
    if int(version.split(".")[0]) < _OLDEST[target]:
        raise ExportError(f"{name} is {version}, and {_OLDEST[target]}.0 or later is needed; upgrade it")
    return version


def engine_devices(target: str, options: EngineOptions) -> tuple[tuple[str, ...], str]:
    """The compute capabilities to build for, and the device's name in an engine's key.

    A TensorRT engine is for the very card that it was built on; a TensorRT-RTX engine for whatever was asked.
    """
    if target == TENSORRT_RTX and options.capabilities:
        return options.capabilities, "any"
    gpu = _gpu(target)
    return (gpu.capability,), gpu.name if target == TENSORRT else "any"


def _gpu(target: str) -> Gpu:
    try:
        gpus = read_gpus()
    except GpuError as error:
        remedy = (
            "name the cards with --compute-capability, like 89 or 80,86,89,120"
            if target == TENSORRT_RTX
            else "TensorRT builds on the card that it runs on: export there, or use the target tensorrt-rtx"
        )
        raise OptionError(f"there is no GPU to build for ({error}); {remedy}") from error
    return gpus[0]
