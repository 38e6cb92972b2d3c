"""What stands in for the tensors of Triton's Python module."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Tensor"]


class Tensor:
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name, self.tensor = name, tensor

    @classmethod
    def from_dlpack(cls, name: str, tensor: torch.Tensor) -> Tensor:
        return cls(name, tensor)

    def name(self) -> str:
        return self._name

    def to_dlpack(self) -> Any:
        return self.tensor.__dlpack__()
