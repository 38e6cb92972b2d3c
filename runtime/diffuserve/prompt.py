"""Prompt -> token ids, as the checkpoint's own tokenizer reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

__all__ = ["Prompt", "PromptTokenizer"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [1, token_limit], int32, and how many of the prompt's own tokens did not fit."""

    ids: torch.Tensor
    tokens_cut: int


class PromptTokenizer:
    """Reads a prompt as diffusers does: cut to the text encoder's length, padded as the tokenizer's file says.

    Raises OSError or ValueError where the file cannot be read.
    """

    def __init__(self, path: Path, token_limit: int) -> None:
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no other kind
            raise ValueError(f"{path} is no tokenizer: {error}; export again") from error
        self._limit = token_limit
        padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end = self._tokenizer.encode("").ids[-1]
        self._padding = padding["pad_id"] if padding else self._end

    def __call__(self, prompt: str) -> Prompt:
        ids = self._tokenizer.encode(prompt).ids
        cut = max(0, len(ids) - self._limit)
        if cut:
            ids = [*ids[: self._limit - 1], self._end]
        ids += [self._padding] * (self._limit - len(ids))
        return Prompt(torch.tensor([ids], dtype=torch.int32), cut)
