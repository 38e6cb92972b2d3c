r"""What a prompt's brackets mean: `plain` gives them no meaning, `a1111` reads them as AUTOMATIC1111's web UI does.

The rules are those of `parse_prompt_attention` in its `modules/prompt_parser.py` (version 1.10), written anew:
`(word)` is 1.1 times as strong, `[word]` 1/1.1 times, `(word:1.3)` 1.3 times; brackets nest, and their factors
multiply; one that is never closed holds to the end, one that was never opened is a letter; `\(`, `\)`, `\[`, `\]` and
`\\` are letters; BREAK begins a new window of the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np

from diffuserve.errors import InvalidArgumentError, UnsupportedError

__all__ = ["MAX_WEIGHT", "Part", "Span", "parse_a1111", "parse_plain"]

#: Of a word, after all brackets around it.
MAX_WEIGHT: Final = 10.0

_ROUND, _SQUARE = 1.1, 1 / 1.1
_PIECES: Final = re.compile(r"\\[()\[\]\\]|[\\()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_BREAK_WORD: Final = re.compile(r"\bBREAK\b")
_AND: Final = re.compile(r"\bAND\b")
_NETWORK: Final = re.compile(r"<\w+:[^<>]+>")
_MARKS: Final = re.compile(r"\\.|[\[\]|:]", re.DOTALL)
# One way only to read a run of digits: with two, a long one that is followed by no number takes its square.
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a prompt, and what its tokens' hidden states are multiplied by."""

    text: str
    weight: float = 1.0


#: None is a BREAK.
Part = Span | None


def parse_plain(text: str) -> list[Part]:
    """Every character is a letter."""
    return [Span(text)]


def parse_a1111(text: str, name: str, *, is_negative: bool = False) -> list[Part]:
    """The parts of the prompt in the input `name`, in its order; at least one.

    Raises UnsupportedError for what A1111 reads as more than one prompt (`[a:b:0.5]`, `[a|b]`, and AND, which means
    nothing in a negative prompt) or as the name of another network (`<lora:...>`), and InvalidArgumentError for a
    weight that is no number, or beyond 10.
    """
    _refuse_unsupported(text, name, is_negative)
    fragments = _fragments(text, name)
    parts = list[Part]()
    for weight, run in groupby(fragments, key=lambda one: one.weight):
        joined = "".join(one.text for one in run)
        # As there: inside brackets that have changed its weight, BREAK is a word.
        parts.append(None if joined == "BREAK" and weight == -1 else Span(joined, weight))
    for part in parts:
        if part is not None and not abs(part.weight) <= MAX_WEIGHT:  # written so that a NaN fails
            raise InvalidArgumentError(
                f"the weight of {part.text[:64]!r} is {part.weight:g}, and must be from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g} after all brackets around it; use fewer of them, or a smaller number",
                input=name,
                value=f"{part.weight:g}",
                minimum=-MAX_WEIGHT,
                maximum=MAX_WEIGHT,
            )
    return parts


def _fragments(text: str, name: str) -> Sequence[Span]:
    """Text between brackets, each with the product of its brackets' factors, the innermost first."""
    texts, factors = list[str](), list[tuple[int, int, float]]()  # factors: of the fragments from .. to
    rounds, squares = list[int](), list[int]()

    def close(opened: list[int], factor: float) -> None:
        factors.append((opened.pop(), len(texts), factor))

    for match in _PIECES.finditer(text):
        piece, number = match[0], match[1]
        if piece.startswith("\\"):
            texts.append(piece[1:])
        elif piece == "(":
            rounds.append(len(texts))
        elif piece == "[":
            squares.append(len(texts))
        elif number is not None and rounds:
            close(rounds, _weight(number, name))
        elif piece == ")" and rounds:
            close(rounds, _ROUND)
        elif piece == "]" and squares:
            close(squares, _SQUARE)
        else:
            texts.extend(_around_breaks(piece))
    factors += [(start, len(texts), _ROUND) for start in rounds] + [(start, len(texts), _SQUARE) for start in squares]
    weights = np.array([-1.0 if one == "BREAK" else 1.0 for one in texts])
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused
        for start, end, factor in factors:
            weights[start:end] *= factor
    return list(map(Span, texts, weights.tolist())) or [Span("")]


def _around_breaks(text: str) -> Iterator[str]:
    """The text with each BREAK on its own, without the spaces around it."""
    pieces = _BREAK_WORD.split(text)
    for index, piece in enumerate(pieces):
        if index:
            yield "BREAK"
            piece = piece.lstrip()
        yield piece if index == len(pieces) - 1 else piece.rstrip()


def _weight(number: str, name: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise InvalidArgumentError(
            f"the weight {number[:64]!r} is no number; write one such as 1.3, or \\( and \\) for brackets that are "
            "letters",
            input=name,
            value=number[:64],
        ) from error


def _refuse_unsupported(text: str, name: str, is_negative: bool) -> None:
    if network := _NETWORK.search(text):
        raise _unsupported(
            network[0],
            "networks are not loaded by prompts; take it out",
            name,
        )
    if not is_negative and _AND.search(text):
        raise _unsupported("AND", "prompts are not composed; write `and`, or send a request for each", name)
    if changing := _changing(text):
        raise _unsupported(
            changing,
            "prompts do not change on the way; choose one of them, or write \\[ and \\] for brackets that are letters",
            name,
        )


def _changing(text: str) -> str | None:
    """The first `[from:to:when]`, `[to:when]` or `[a|b]`."""
    opened = list[tuple[int, int, bool]]()  # where it begins, where its last colon is, whether a bar is in it
    for match in _MARKS.finditer(text):
        mark, at = match[0], match.start()
        if mark == "[":
            opened.append((at, -1, False))
        elif mark == "]" and opened:
            start, colon, has_bar = opened.pop()
            if has_bar or (colon >= 0 and _NUMBER.fullmatch(text, colon + 1, at)):
                return text[start : at + 1]
        elif mark == ":" and opened:
            opened[-1] = (opened[-1][0], at, opened[-1][2])
        elif mark == "|" and opened:
            opened[-1] = (*opened[-1][:2], True)
    return None


def _unsupported(found: str, why: str, name: str) -> UnsupportedError:
    return UnsupportedError(f"{name} holds {found[:64]!r}, and {why}", input=name)
