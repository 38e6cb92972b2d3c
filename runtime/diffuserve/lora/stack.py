"""The adapters of one engine's call as it takes them: `lora` [adapters, P] and `lora_index` [rows]."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch

from diffuserve.components import input_type
from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Component

__all__ = ["AdapterStack"]

K = TypeVar("K", bound=Hashable)


class AdapterStack(Generic[K]):
    """Keeps the tensor of the last call, and makes another only where a call has other adapters.

    `component` must take adapters; `device` is where it takes them. Not safe to call from several threads.
    """

    def __init__(self, component: Component, device: torch.device | None = None) -> None:
        layout = component.lora
        assert layout is not None
        #: Of one call, the zeros of adapter 0 aside.
        self.most = layout.adapters - 1
        self._none = torch.zeros(1, layout.size, dtype=input_type(component, LORA), device=device)
        self._device = device
        self._stacked = self._none
        self._places: dict[K, int] = {}

    def inputs(self, rows: Sequence[tuple[K, torch.Tensor] | None]) -> dict[str, torch.Tensor]:
        """The two inputs, of each row's adapter and what tells it from others; None is none."""
        adapters = {one[0]: one[1] for one in rows if one is not None}
        if adapters.keys() != self._places.keys():
            vectors = [one.to(self._device)[None] for one in adapters.values()]
            self.clear()  # the old ones go before the new ones are made
            self._stacked = torch.cat([self._none, *vectors])
            self._places = {key: place for place, key in enumerate(adapters, start=1)}
        index = [0 if one is None else self._places[one[0]] for one in rows]
        return {LORA: self._stacked, LORA_INDEX: torch.tensor(index, dtype=torch.int64, device=self._device)}

    def clear(self) -> None:
        """Let go of the last call's adapters."""
        self._stacked, self._places = self._none, {}
