"""One TensorRT or TensorRT-RTX engine, run on torch tensors where they are.

Both packages have the same classes, so the package is a parameter. Profiles share one block of activation memory:
calls run one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from diffuserve.errors import ComponentFailedError, InvalidArgumentError

if TYPE_CHECKING:
    import tensorrt

__all__ = ["EngineSession"]

_DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}
_Shape = tuple[int, ...]


class EngineSession:
    """An opened engine. Not thread safe."""

    def __init__(self, package: Any, engine: bytes, device: torch.device) -> None:
        """Raises ComponentFailedError where the engine cannot be opened on `device`, the current one."""
        self._package, self._device = package, device
        self._logger = package.Logger(package.Logger.WARNING)
        self._runtime: tensorrt.Runtime = package.Runtime(self._logger)
        opened = self._runtime.deserialize_cuda_engine(engine)
        if opened is None:
            raise ComponentFailedError(f"{package.__name__} {package.__version__} cannot open the engine; see its log")
        self._engine: tensorrt.ICudaEngine = opened
        names = [opened.get_tensor_name(index) for index in range(opened.num_io_tensors)]
        is_input = {name: opened.get_tensor_mode(name) == package.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        self._stream: torch.cuda.Stream | None = _new_stream(device) if device.type == "cuda" else None
        self._memory = self._reserve()
        self._contexts: dict[int, tensorrt.IExecutionContext] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name, on the session's device, complete.

        Raises InvalidArgumentError for a tensor that is missing, of another type, or of a shape that no profile takes.
        """
        tensors = {name: self._checked(name, inputs.get(name)) for name in self.inputs}
        context = self._context(self._profile(tensors))
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self.outputs:
            shape = _sides(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._dtype(name), device=self._device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        self._execute(context)
        return outputs

    def _execute(self, context: tensorrt.IExecutionContext) -> None:
        if self._stream is not None:
            # What made the inputs may still be running.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if not context.execute_async_v3(self._handle):
            raise ComponentFailedError("the engine did not run; see its log")
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def _handle(self) -> int:
        return int(self._stream.cuda_stream) if self._stream is not None else 0

    def _checked(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor:
        if tensor is None:
            raise InvalidArgumentError(f"the input {name} is missing", input=name)
        if tensor.dtype != self._dtype(name):
            raise InvalidArgumentError(f"{name} is {tensor.dtype}, and {self._dtype(name)} is taken", input=name)
        return tensor.to(self._device).contiguous()

    def _dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._engine.get_tensor_dtype(name).name]

    def _profile(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """The first profile that takes all shapes: static ones come before the ranges that hold them."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for index in range(self._engine.num_optimization_profiles):
            if all(self._takes(index, name, shape) for name, shape in shapes.items()):
                return index
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InvalidArgumentError(f"no profile of the engine takes {listed}")

    def _takes(self, index: int, name: str, shape: _Shape) -> bool:
        low, _, high = (_sides(one) for one in self._engine.get_tensor_profile_shape(name, index))
        return len(shape) == len(low) and all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True))

    def _reserve(self) -> torch.Tensor:
        count = self._engine.num_optimization_profiles
        needed = max(self._engine.get_device_memory_size_for_profile_v2(index) for index in range(count))
        try:
            return torch.empty(max(1, needed), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise ComponentFailedError(
                f"the engine needs {needed / 1e9:.2f} GB for activations, and the GPU has not as much free; "
                "export with fewer rows or smaller sizes"
            ) from error

    def _context(self, profile: int) -> tensorrt.IExecutionContext:
        """The profile's context, made at its first call."""
        if profile not in self._contexts:
            strategy = self._package.ExecutionContextAllocationStrategy.USER_MANAGED
            context: tensorrt.IExecutionContext | None = self._engine.create_execution_context(strategy)
            if context is None or not context.set_optimization_profile_async(profile, self._handle):
                raise ComponentFailedError(f"no context can be made for profile {profile}; see the log")
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
            self._contexts[profile] = context
        return self._contexts[profile]


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _sides(dims: tensorrt.Dims) -> _Shape:
    return tuple(int(dims[axis]) for axis in range(len(dims)))
