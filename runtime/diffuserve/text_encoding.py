"""Windows of tokens -> hidden states, through one text encoder, with what was encoded lately kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from diffuserve.components import ComponentRunner, cast_inputs, check_rows
from diffuserve.lora.choice import LoraKey
from diffuserve.lora.stack import AdapterStack
from diffuserve.manifest import Component
from diffuserve.spec import CLIP_SKIP, EMBEDDINGS, INPUT_IDS

__all__ = ["TextEncoder", "WindowKey", "emphasized"]

_RECENT_BYTES: Final = 64 << 20  # of each text encoder: 270 prompts of SD1.5's


@dataclass(frozen=True, slots=True)
class WindowKey:
    """All that an encoder's answer depends on: the ids, where those of a textual inversion's vectors are given to
    no others ever, how many layers are left out, and the adapter, if it changes this encoder. Weights are put on what
    it answers.
    """

    ids: tuple[int, ...]
    clip_skip: int
    adapter: LoraKey = ()


_Row = dict[str, torch.Tensor]


class _Recent:
    """The encodings of the windows that were asked for last: prompts are tried with many seeds, and negative prompts
    are shared by many requests.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._rows: dict[WindowKey, _Row] = {}

    def of(
        self, wanted: Sequence[WindowKey], encode: Callable[[Sequence[WindowKey]], list[_Row]]
    ) -> dict[WindowKey, _Row]:
        """The rows of the windows, each encoded once, together and only where it is not here."""
        keys = list(dict.fromkeys(wanted))
        missing = [key for key in keys if key not in self._rows]
        new = dict(zip(missing, encode(missing), strict=True)) if missing else {}
        # Taken out only now: where encoding failed, what was here stays.
        found = {key: self._rows.pop(key) for key in keys if key not in new}
        self._rows |= found | new  # the newest last
        self._bytes += sum(map(_bytes_of, new.values()))
        while self._bytes > self._capacity:
            self._bytes -= _bytes_of(self._rows.pop(next(iter(self._rows))))
        return found | new


def _bytes_of(row: _Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


class TextEncoder:
    """One text encoder of a checkpoint. `outputs` are those that are wanted; ids from `vocabulary` on are vectors."""

    def __init__(
        self, component: Component, runner: ComponentRunner, outputs: Sequence[str], vocabulary: int, max_rows: int
    ) -> None:
        self._component, self._runner, self._outputs = component, runner, tuple(outputs)
        self._vocabulary, self.max_rows = vocabulary, max_rows
        width = next(one.shape[-1] for one in component.inputs if one.name == EMBEDDINGS)
        self._no_vectors = torch.zeros(1, int(width))
        self._stack = AdapterStack[LoraKey](component) if component.lora else None
        self.recent = _Recent(_RECENT_BYTES)

    def __call__(
        self,
        wanted: Sequence[WindowKey],
        vectors: Mapping[int, torch.Tensor],
        adapters: Mapping[LoraKey, torch.Tensor],
        trace: object | None = None,
    ) -> dict[WindowKey, _Row]:
        """The encoder's outputs of each window by name, float32 without the row's dimension.

        `vectors` [D] are those of the ids that are beyond the vocabulary, `adapters` [P] those of the windows.
        """
        try:
            return self.recent.of(wanted, partial(self._encode, vectors, adapters, trace))
        finally:
            if self._stack is not None:
                self._stack.clear()

    def _encode(
        self,
        vectors: Mapping[int, torch.Tensor],
        adapters: Mapping[LoraKey, torch.Tensor],
        trace: object | None,
        keys: Sequence[WindowKey],
    ) -> list[_Row]:
        """In as few calls as the engine's rows and adapters allow, in the windows' order."""
        calls = [list[WindowKey]()]
        for key in keys:
            used = {one.adapter for one in calls[-1] if one.adapter} | ({key.adapter} if key.adapter else set())
            if len(calls[-1]) == self.max_rows or (self._stack and len(used) > self._stack.most):
                calls.append([])
            calls[-1].append(key)
        return [row for some in calls for row in self._run(some, vectors, adapters, trace)]

    def _run(
        self,
        keys: Sequence[WindowKey],
        vectors: Mapping[int, torch.Tensor],
        adapters: Mapping[LoraKey, torch.Tensor],
        trace: object | None,
    ) -> list[_Row]:
        used = list(dict.fromkeys(one for key in keys for one in key.ids if one >= self._vocabulary))
        number = {one: self._vocabulary + index for index, one in enumerate(used)}
        inputs = {
            INPUT_IDS: torch.tensor([[number.get(one, one) for one in key.ids] for key in keys], dtype=torch.int32),
            CLIP_SKIP: torch.tensor([key.clip_skip for key in keys], dtype=torch.int32),
            EMBEDDINGS: torch.stack([vectors[one] for one in used]) if used else self._no_vectors,
        }
        if self._stack is not None:
            inputs |= self._stack.inputs(
                [(key.adapter, adapters[key.adapter]) if key.adapter else None for key in keys]
            )
        outputs = self._runner.run(self._component, cast_inputs(self._component, inputs), trace=trace)
        of_rows = {one: check_rows(self._component, outputs[one], len(keys)) for one in self._outputs}
        # Copies, each on its own: rows are kept, and the component's memory is lent.
        return [
            {one: tensor[row].to(torch.float32, copy=True) for one, tensor in of_rows.items()}
            for row in range(len(keys))
        ]


def emphasized(hidden: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Hidden states [tokens, D] times their tokens' weights, and all times one factor, so that their mean is as it was.

    As A1111's "Original" emphasis does with each window (its `modules/sd_emphasis.py`).
    """
    if all(weight == 1 for weight in weights):
        return hidden
    weighted = hidden * hidden.new_tensor(weights)[:, None]
    factor = hidden.mean() / weighted.mean()
    return weighted * factor if factor.isfinite() else weighted
