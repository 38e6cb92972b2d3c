"""The port through which component models run: BLS inside Triton, in-process for tests and benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import Component

__all__ = ["ComponentRunner", "InProcessRunner", "check_rows"]


class ComponentRunner(Protocol):
    """Runs one component model. Implementations are called from several threads at once."""

    def run(self, component: Component, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The component's outputs by name.

        Raises ComponentFailedError, naming the component, whatever went wrong below.
        """
        ...


class InProcessRunner:
    """Runs functions in place of models, by their Triton model names."""

    def __init__(self, models: Mapping[str, Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]]) -> None:
        self._models = models

    def run(self, component: Component, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return self._models[component.model](inputs)
        except Exception as error:
            raise ComponentFailedError(f"{component.model} failed: {error!r}", component=component.model) from error


def check_rows(component: Component, output: torch.Tensor, rows: int) -> torch.Tensor:
    """The output, once it is known to have as many rows as went in."""
    if output.shape[0] != rows:
        raise ComponentFailedError(
            f"{component.model} gave {output.shape[0]} rows for {rows}", component=component.model
        )
    return output
