"""What NVML says of this machine's GPUs. The package nvidia-ml-py is loaded only when it is asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["RTX_CAPABILITIES", "Driver", "Gpu", "GpuError", "read_driver", "read_gpus"]

# What TensorRT-RTX 1.7 builds for, on any machine. The H100's 9.0 is not among them.
RTX_CAPABILITIES: Final = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


class GpuError(Exception):
    """There is no GPU, or nothing that could tell of one. The message says which."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `capability` is its compute capability, like "8.9"."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver's version, like "580.65.06", and the newest CUDA that it runs, like "13.0"."""

    version: str
    cuda: str


def read_gpus(nvml: Any = None) -> tuple[Gpu, ...]:
    """Every card that NVML sees, at least one. Raises GpuError."""
    with _opened(nvml) as nvml:
        gpus = tuple(_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount()))
    if not gpus:
        raise GpuError("the NVIDIA driver sees no GPU")
    return gpus


def read_driver(nvml: Any = None) -> Driver:
    """Raises GpuError where there is no driver."""
    with _opened(nvml) as nvml:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        return Driver(_text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}")


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", int(memory.total), int(memory.free))


@contextmanager
def _opened(nvml: Any) -> Iterator[Any]:
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError as error:
        raise GpuError("nvidia-ml-py is not installed: pip install 'diffuserve[gpu]'") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise GpuError(f"no NVIDIA driver: {error}") from error
    try:
        yield nvml
    except nvml.NVMLError as error:
        raise GpuError(f"the NVIDIA driver does not answer: {error}") from error
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
