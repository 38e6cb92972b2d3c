"""The tensor of a call's adapters: it is made again only where others are in the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffuserve.lora.stack import AdapterStack
from unit.fakes import component
from unit.lora.files import LAYOUTS, adapted

UNET = adapted(component("unet"), LAYOUTS["unet"])
SIZE = LAYOUTS["unet"].size


def row(key: str) -> tuple[str, torch.Tensor]:
    return key, torch.full((SIZE,), float(ord(key)))


def test_rows_choose_their_adapter_and_none_is_zeros() -> None:
    stack = AdapterStack[str](UNET)
    inputs = stack.inputs([row("a"), None, row("b"), row("b"), row("a")])
    assert inputs["lora_index"].tolist() == [1, 0, 2, 2, 1]
    assert inputs["lora"][:, 0].tolist() == [0, ord("a"), ord("b")]
    assert (inputs["lora"].dtype, inputs["lora_index"].dtype) == (torch.float32, torch.int64)
    assert stack.most == LAYOUTS["unet"].adapters - 1


def test_it_is_made_again_only_for_others() -> None:
    stack = AdapterStack[str](UNET)
    first = stack.inputs([row("a"), row("b")])["lora"]
    assert stack.inputs([None, row("b"), row("a"), row("a")])["lora"] is first
    assert stack.inputs([row("b"), row("a")])["lora_index"].tolist() == [2, 1]
    second = stack.inputs([row("a"), row("c")])["lora"]
    assert second is not first
    assert second[:, 0].tolist() == [0, ord("a"), ord("c")]
    assert len(stack.inputs([None, None])["lora"]) == 1
    stack.inputs([row("a")])
    stack.clear()
    assert len(stack.inputs([None])["lora"]) == 1


def test_it_is_made_again_where_there_was_no_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> torch.Tensor:
        raise MemoryError

    stack = AdapterStack[str](UNET)
    stack.inputs([row("a")])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", no_memory)
        with pytest.raises(MemoryError):
            stack.inputs([row("b")])
    assert stack.inputs([row("a")])["lora"][:, 0].tolist() == [0, ord("a")]
