"""A stand-in for the packages tensorrt and tensorrt_rtx: engines whose output is twice their first input.

What a context must be told before it may run is checked as TensorRT checks it.
"""

from __future__ import annotations

import ctypes
import enum
import json
from typing import Any

import torch

__name__ = "tensorrt_rtx"
__version__ = "1.7.1.116"


class Logger:
    WARNING = 2

    def __init__(self, severity: int) -> None:
        self.severity = severity


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class DataType(enum.Enum):
    FLOAT = 0
    INT32 = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


def plan(*profiles: tuple[list[int], list[int]], memory: int = 512) -> bytes:
    """An engine's bytes: min and max shape of `sample` for each profile."""
    return json.dumps({"profiles": profiles, "memory": memory}).encode()


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, engine: bytes) -> Engine | None:
        try:
            return Engine(json.loads(engine))
        except ValueError:
            return None


class Engine:
    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.num_optimization_profiles = len(raw["profiles"])
        self.num_io_tensors = 3
        self.made = 0

    def get_tensor_name(self, index: int) -> str:
        return ("sample", "timestep", "model_output")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name == "model_output" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        low, high = self.raw["profiles"][index]
        return [low, high, high] if name == "sample" else [low[:1], high[:1], high[:1]]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return int(self.raw["memory"]) * (index + 1)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.made += 1
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.memory = engine, -1, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        self.memory = size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        low, _, high = self.engine.get_tensor_profile_shape("sample", self.profile)
        shape = self.shapes["sample"]
        assert all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True))
        count = int(torch.Size(shape).numel())
        floats = ctypes.c_float * count
        sample = floats.from_address(self.addresses["sample"])
        output = floats.from_address(self.addresses["model_output"])
        for index in range(count):
            output[index] = 2 * sample[index]
        return count != 7
