"""Tokens in the windows of a text encoder: 77 each, of which 75 are a prompt's, and two mark its begin and its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tokenizers import Tokenizer

__all__ = ["COMMA_BACKTRACK", "PromptTokenizer", "Token", "Unit", "Window", "windows"]

#: A1111's setting of this name, by default: how far back from the end of a window it looks for a comma to break at.
COMMA_BACKTRACK: Final = 20


class Token(NamedTuple):
    """An id, and what its hidden state is multiplied by. Ids beyond the vocabulary are a textual inversion's."""

    id: int
    weight: float = 1.0


#: Tokens that stay in one window: one, or those of one textual inversion.
Unit = Sequence[Token]


@dataclass(frozen=True, slots=True)
class Window:
    """What a text encoder reads in one row: ids with their marks and padding, and as many weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


class PromptTokenizer:
    """Text -> ids, as the checkpoint's own tokenizer reads it, and tokens -> windows, padded as its file says.

    Raises OSError or ValueError where the file cannot be read.
    """

    def __init__(self, path: Path, token_limit: int) -> None:
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no other kind
            raise ValueError(f"{path} is no tokenizer: {error}; export again") from error
        padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._begin, self._end = self._tokenizer.encode("").ids
        self._padding = padding["pad_id"] if padding else self._end
        self._limit = token_limit
        #: Tokens of a prompt that one window takes.
        self.room = token_limit - 2
        self.comma: int | None = self._tokenizer.token_to_id(",</w>")

    def ids(self, text: str) -> list[int]:
        """The text's own, without marks."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def window(self, tokens: Sequence[Token] = ()) -> Window:
        """At most `room` tokens, with their marks; none is the empty prompt."""
        padding = self._limit - 2 - len(tokens)
        ids = (self._begin, *(one.id for one in tokens), self._end, *[self._padding] * padding)
        return Window(ids, (1.0, *(one.weight for one in tokens), *[1.0] * (1 + padding)))


def windows(
    parts: Iterable[Iterable[Unit] | None], room: int, comma: int | None = None, backtrack: int = 0
) -> list[list[Token]]:
    """Fill windows of `room` tokens with the parts' units, one after another; None begins a new window.

    With `backtrack`, what stands after the last comma of a full window moves to the next one, if it is no more tokens
    than that: the rules of `tokenize_line` in A1111's `modules/sd_hijack_clip.py` (version 1.10).
    """
    done, current = list[list[Token]](), list[Token]()
    comma_at: int | None = None

    def close() -> None:
        nonlocal current, comma_at
        done.append(current)
        current, comma_at = [], None

    for part in parts:
        if part is None:
            close()
            continue
        for unit in part:
            if unit[0].id == comma:
                comma_at = len(current)
            elif len(current) == room and comma_at is not None and room - comma_at <= backtrack:
                kept, moved = current[: comma_at + 1], current[comma_at + 1 :]
                current = kept
                close()
                current = moved
            if len(current) + len(unit) > room:
                close()
            current.extend(unit)
    if current or not done:
        done.append(current)
    return done
