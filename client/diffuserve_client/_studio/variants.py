"""What `compare` compares: every combination of the values of its axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import GenerateRequest

__all__ = ["MAX_PICTURES", "NO_LORA", "Plan", "Variant", "loras_of"]

MAX_PICTURES: Final = 256
NO_LORA: Final = "none"
_BETWEEN_LORAS: Final = "+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One combination: a value of each axis, None for the checkpoint's own. `lora` is as in night:0.8+bar:0.5."""

    prompt: str
    checkpoint: str | None = None
    sampler: str | None = None
    lora: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None

    def request(self, seed: int, common: Mapping[str, Any]) -> GenerateRequest:
        """Its picture of a seed. Raises InvalidArgumentError."""
        return GenerateRequest(
            prompt=self.prompt,
            checkpoint=self.checkpoint,
            sampler=self.sampler,
            loras=loras_of(self.lora),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=seed,
            **common,
        )


AXES: Final = tuple(one.name for one in fields(Variant))


def loras_of(text: str | None) -> tuple[str, ...]:
    """The LoRAs of one value of that axis: `none`, or several with a + between them."""
    return () if text is None or text == NO_LORA else tuple(one.strip() for one in text.split(_BETWEEN_LORAS))


@dataclass(frozen=True, slots=True)
class Plan:
    """The variants, in the order of their numbers, and for each the place of the one that it is measured against."""

    axes: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    baselines: tuple[int, ...]

    @property
    def varying(self) -> tuple[str, ...]:
        """The axes that tell variants apart."""
        return tuple(name for name, values in self.axes.items() if len(values) > 1)

    @classmethod
    def of(cls, axes: Mapping[str, Sequence[Any]], seeds: Sequence[int], baseline: Sequence[str] = ()) -> Plan:
        """`axes` holds the values that were given of each, none for the checkpoint's own.

        `baseline` is a variant's number, or `axis=value` texts: then each variant is measured against the one that
        differs from it in those axes alone. Without, each is measured against the first; where not only prompts vary,
        against the first of its prompt.

        Raises InvalidArgumentError.
        """
        given = {name: tuple(axes.get(name) or (None,)) for name in AXES}
        for name, values in given.items():
            twice = next((one for one in values if values.count(one) > 1), None)
            if twice is not None:
                raise InvalidArgumentError(f"the {_said(name)} {twice!r} is given twice; give it once", input=name)
        _check_count(given, len(seeds))
        variants = tuple(
            Variant(**dict(zip(AXES, values, strict=True))) for values in itertools.product(*given.values())
        )
        return cls(given, tuple(seeds), variants, _baselines(variants, given, baseline))


def _said(axis: str) -> str:
    return {"lora": "LoRA"}.get(axis, axis.replace("_", " "))


def _check_count(axes: Mapping[str, tuple[Any, ...]], seeds: int) -> None:
    counts = {name: len(values) for name, values in axes.items() if len(values) > 1}
    count = math.prod(counts.values()) * seeds
    if count > MAX_PICTURES:
        terms = [*(f"{number} of {_said(name)}" for name, number in counts.items()), f"{seeds} seeds"]
        raise InvalidArgumentError(
            f"{' x '.join(terms)} are {count} pictures, and at most {MAX_PICTURES} are compared; leave some out",
            value=count,
            maximum=MAX_PICTURES,
        )


def _baselines(
    variants: Sequence[Variant], axes: Mapping[str, tuple[Any, ...]], baseline: Sequence[str]
) -> tuple[int, ...]:
    if len(baseline) == 1 and "=" not in baseline[0]:
        number = int(baseline[0]) if baseline[0].isdecimal() else 0
        if not 1 <= number <= len(variants):
            raise InvalidArgumentError(
                f"the baseline is {baseline[0][:80]!r}, and must be a variant's number, from 1 to {len(variants)}, or "
                "as in sampler=ddim",
                input="baseline",
            )
        return (number - 1,) * len(variants)
    pinned = dict(_pin(text, axes) for text in baseline) or _first(axes)
    return tuple(variants.index(replace(one, **pinned)) for one in variants)


def _first(axes: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The first value of each axis, but of the prompt where anything else varies: pictures of other things are apart
    however they were made."""
    others = {name: values[0] for name, values in axes.items() if name != "prompt"}
    varies = any(len(values) > 1 for name, values in axes.items() if name != "prompt")
    return others if varies else {**others, "prompt": axes["prompt"][0]}


def _pin(text: str, axes: Mapping[str, tuple[Any, ...]]) -> tuple[str, Any]:
    """An axis, and the value that the baseline has of it."""
    name, separator, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not separator or name not in axes:
        raise InvalidArgumentError(
            f"the baseline {text[:80]!r} names no axis; write one of {', '.join(AXES)}, as in sampler=ddim",
            input="baseline",
        )
    for known in axes[name]:
        if known is not None and _same(known, value):
            return name, known
    listed = ", ".join(str(one)[:40] for one in axes[name] if one is not None) or "no value of it"
    raise InvalidArgumentError(
        f"the baseline {text[:80]!r} is not among what is compared: {listed}; give that value to its option",
        input="baseline",
    )


def _same(known: Any, text: str) -> bool:
    if isinstance(known, str):
        return known == text
    try:
        return bool(float(known) == float(text))
    except ValueError:
        return False
