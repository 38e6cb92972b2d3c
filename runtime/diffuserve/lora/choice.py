"""What a request says of a LoRA: `name`, `name:weight`, and `:truncate` after either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.named_files import MAX_NAME, NAME

__all__ = ["MAX_LORAS", "MAX_WEIGHT", "LoraChoice", "LoraKey", "lora_key", "parse_loras"]

MAX_LORAS: Final = 8
MAX_WEIGHT: Final = 10.0

#: What makes two adapters of a checkpoint the same; empty for none.
LoraKey = tuple[tuple[str, float, bool], ...]

_TRUNCATE: Final = "truncate"


def lora_key(files: Sequence[Mapping[str, Any]]) -> LoraKey:
    """Of a ResolvedRequest's `loras`; their order is of no matter to the sum."""
    return tuple(sorted((one["digest"], one["weight"], one["truncated"]) for one in files if one["weight"]))


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One LoRA of a request. `is_truncated`: it may be cut down to the rank that is left for it."""

    name: str
    weight: float = 1.0
    is_truncated: bool = False

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Raises InvalidArgumentError with what is wrong, and how it is written."""
        name, *rest = text.split(":")
        is_truncated = rest[-1:] == [_TRUNCATE]
        rest = rest[:-1] if is_truncated else rest
        if not NAME.fullmatch(name) or len(rest) > 1:
            raise _bad(
                text, f"has no such form: a name of letters, digits, '_', '-' and '.', {MAX_NAME} at most, and no path"
            )
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError as error:
            raise _bad(text, "has a weight that is no number") from error
        if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:  # written so that a NaN fails
            raise _bad(text, f"has a weight that is not from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return cls(name, weight, is_truncated)


def parse_loras(texts: Sequence[str]) -> tuple[LoraChoice, ...]:
    """The LoRAs of one request, in its order. Raises InvalidArgumentError."""
    if len(texts) > MAX_LORAS:
        raise InvalidArgumentError(
            f"loras has {len(texts)} values, and at most {MAX_LORAS} are taken; leave some out",
            input="loras",
            value=len(texts),
            maximum=MAX_LORAS,
        )
    choices = tuple(map(LoraChoice.parse, texts))
    names = [one.name.lower() for one in choices]
    for one in choices:
        if names.count(one.name.lower()) > 1:
            raise InvalidArgumentError(
                f"loras names {one.name} more than once; give it once, with the sum of the weights", input="loras"
            )
    return choices


def _bad(text: str, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"loras holds {text[:96]!r}, which {what}; write name, name:0.8 or name:0.8:{_TRUNCATE}",
        input="loras",
        value=text[:96],
    )
