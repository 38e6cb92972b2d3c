"""The port through which component models run: BLS inside Triton, in-process for tests and benches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import torch

from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import Component, TensorShape

__all__ = [
    "CallLog",
    "ComponentRunner",
    "InProcessRunner",
    "blank_inputs",
    "cast_inputs",
    "check_rows",
    "input_type",
]


class ComponentRunner(Protocol):
    """Runs one component model. Implementations are called from several threads at once."""

    def run(
        self, component: Component, inputs: Mapping[str, torch.Tensor], *, trace: object | None = None
    ) -> dict[str, torch.Tensor]:
        """The component's outputs by name. `trace` is the trace of the request that the call is made for.

        Raises ComponentFailedError, naming the component, whatever went wrong below.
        """
        ...


class InProcessRunner:
    """Runs functions in place of models, by their Triton model names."""

    def __init__(self, models: Mapping[str, Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]]) -> None:
        self._models = models

    def run(
        self,
        component: Component,
        inputs: Mapping[str, torch.Tensor],
        *,
        trace: object | None = None,  # noqa: ARG002
    ) -> dict[str, torch.Tensor]:
        try:
            return self._models[component.model](inputs)
        except Exception as error:
            raise ComponentFailedError(f"{component.model} failed: {error!r}", component=component.model) from error


class CallLog:
    """A runner that writes each call of another as a line of JSON: the model, its inputs' shapes, start and seconds.

    Benches replay these calls on the bare engines.
    """

    def __init__(self, runner: ComponentRunner, path: Path) -> None:
        self._runner, self._file = runner, path.open("w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def run(
        self, component: Component, inputs: Mapping[str, torch.Tensor], *, trace: object | None = None
    ) -> dict[str, torch.Tensor]:
        started = time.monotonic()
        outputs = self._runner.run(component, inputs, trace=trace)
        line = {
            "model": component.model,
            "shapes": {name: list(tensor.shape) for name, tensor in inputs.items()},
            "started": started,
            "seconds": time.monotonic() - started,
        }
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
        return outputs


_FLOATS: Final = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
_DTYPES: Final = {**_FLOATS, "INT32": torch.int32, "INT64": torch.int64}


def cast_inputs(component: Component, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating-point inputs in the precision that the component's engine takes them in."""
    types = {one.name: _FLOATS.get(one.datatype) for one in component.inputs}
    return {name: tensor if (dtype := types.get(name)) is None else tensor.to(dtype) for name, tensor in inputs.items()}


def input_type(component: Component, name: str) -> torch.dtype | None:
    """What the component's engine takes an input in; None where it has none of that name."""
    return next((_DTYPES[one.datatype] for one in component.inputs if one.name == name), None)


def blank_inputs(component: Component, sides: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Zeros for every input of the component, with these lengths of the sides that vary."""

    def shape(one: TensorShape) -> list[int]:
        return [sides[side] if isinstance(side, str) else side for side in one.shape]

    return {one.name: torch.zeros(shape(one), dtype=_DTYPES[one.datatype]) for one in component.inputs}


def check_rows(component: Component, output: torch.Tensor, rows: int) -> torch.Tensor:
    """The output, once it is known to have as many rows as went in."""
    if output.shape[0] != rows:
        raise ComponentFailedError(
            f"{component.model} gave {output.shape[0]} rows for {rows}", component=component.model
        )
    return output
