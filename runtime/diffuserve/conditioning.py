"""Requests -> the UNet's inputs beside its latents and timesteps, as a manifest's `Conditioning` says.

No family is named here: the manifest has which inputs there are, and what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from diffuserve.components import ComponentRunner, check_rows
from diffuserve.engine import HIDDEN_STATES
from diffuserve.manifest import Component, Manifest
from diffuserve.prompt import PromptTokenizer
from diffuserve.request import ResolvedRequest
from diffuserve.spec import UNET

__all__ = ["Conditioned", "Conditioner", "embedded_guidance"]

_TEXT_EMBEDS: Final = "text_embeds"
_TIME_IDS: Final = "time_ids"
_GUIDANCE: Final = "timestep_cond"
_RECENT_BYTES: Final = 64 << 20  # of each text encoder: 270 prompts of SD1.5's


@dataclass(frozen=True, slots=True)
class Conditioned:
    """What the UNet is told for one request, by input name [request.rows, ...] float32.

    `tokens_cut` is how many tokens of the prompt did not fit.
    """

    inputs: dict[str, torch.Tensor]
    tokens_cut: int


_Ids = tuple[int, ...]
_Row = dict[str, torch.Tensor]


class _Recent:
    """The encodings of the texts that were asked for last: prompts are tried with many seeds, and negative prompts are
    shared by many requests.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._rows: dict[_Ids, _Row] = {}

    def of(self, wanted: Sequence[_Ids], encode: Callable[[Sequence[_Ids]], list[_Row]]) -> dict[_Ids, _Row]:
        """The rows of the texts, each encoded once, in one call and only where it is not here."""
        texts = list(dict.fromkeys(wanted))
        missing = [ids for ids in texts if ids not in self._rows]
        new = dict(zip(missing, encode(missing), strict=True)) if missing else {}
        # Taken out only now: where encoding failed, what was here stays.
        found = {ids: self._rows.pop(ids) for ids in texts if ids not in new}
        self._rows |= found | new  # the newest last
        self._bytes += sum(map(_bytes_of, new.values()))
        while self._bytes > self._capacity:
            self._bytes -= _bytes_of(self._rows.pop(next(iter(self._rows))))
        return found | new


def _bytes_of(row: _Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


@dataclass(frozen=True, slots=True)
class _Encoder:
    component: Component
    tokenizer: PromptTokenizer
    recent: _Recent


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One encoder's outputs for some texts, by name [texts, ...] float32, and how many tokens each was cut by."""

    outputs: dict[str, torch.Tensor]
    tokens_cut: list[int]


class Conditioner:
    """Conditioning of one checkpoint. `folder` is the manifest's.

    Raises OSError or ValueError where a tokenizer cannot be read, or where the UNet takes other inputs than the
    manifest says how to make.
    """

    def __init__(self, manifest: Manifest, folder: Path, runner: ComponentRunner) -> None:
        self._manifest, self._how, self._runner = manifest, manifest.conditioning, runner
        _check_inputs(manifest)
        self._encoders = {
            one.component: _Encoder(
                manifest.components[one.component],
                PromptTokenizer(folder / one.tokenizer, manifest.token_limit),
                _Recent(_RECENT_BYTES),
            )
            for one in self._how.encoders
        }

    def max_texts(self, width: int, height: int) -> int:
        """How many prompts every text encoder takes in one call."""
        return min(self._manifest.max_rows(name, width, height) for name in self._encoders)

    def __call__(self, requests: Sequence[ResolvedRequest], trace: object | None = None) -> list[Conditioned]:
        """What the UNet is told for each of `requests`, whose texts are encoded together."""
        texts = [text for request in requests for text in self._texts(request)]
        encoded = {name: self._encode(name, texts, trace) for name in self._encoders}
        inputs = {HIDDEN_STATES: torch.cat([one.outputs["hidden_states"] for one in encoded.values()], dim=-1)}
        if self._how.text_embeds:
            inputs[_TEXT_EMBEDS] = encoded[self._how.text_embeds].outputs["pooled"]
        told, first = [], 0
        for request in requests:
            rows = slice(first, first + request.rows)
            # Copies: a request that runs for long must not keep the others' rows.
            own = {name: tensor[rows].clone() for name, tensor in inputs.items()}
            own |= {name: row.expand(request.rows, -1) for name, row in self._further(request)}
            told.append(Conditioned(own, max(one.tokens_cut[first] for one in encoded.values())))
            first = rows.stop
        return told

    def _texts(self, request: ResolvedRequest) -> list[str | None]:
        """What each of the request's rows is told; None stands for zeros instead of an encoding."""
        negative = request.request.negative_prompt
        no_text = not negative and self._how.zero_empty_negative
        return [request.request.prompt, None if no_text else negative][: request.rows]

    def _encode(self, name: str, texts: Sequence[str | None], trace: object | None) -> _Encoded:
        encoder = self._encoders[name]
        read = [None if text is None else encoder.tokenizer(text) for text in texts]
        ids = [None if one is None else tuple(one.ids[0].tolist()) for one in read]
        rows = encoder.recent.of([one for one in ids if one is not None], partial(self._run, name, trace))
        wanted = next(iter(rows.values()))  # a prompt is always encoded
        outputs = {
            output: torch.stack([torch.zeros_like(row) if one is None else rows[one][output] for one in ids])
            for output, row in wanted.items()
        }
        return _Encoded(outputs, [0 if one is None else one.tokens_cut for one in read])

    def _run(self, name: str, trace: object | None, ids: Sequence[_Ids]) -> list[_Row]:
        """An encoder's outputs for each of `ids`, float32 without the row's dimension."""
        component = self._encoders[name].component
        outputs = self._runner.run(component, {"input_ids": torch.tensor(ids, dtype=torch.int32)}, trace=trace)
        wanted = ("hidden_states", "pooled") if name == self._how.text_embeds else ("hidden_states",)
        of_texts = {one: check_rows(component, outputs[one], len(ids)) for one in wanted}
        # Copies, each on its own: rows are kept, and the component's memory is lent.
        return [
            {one: tensor[row].to(torch.float32, copy=True) for one, tensor in of_texts.items()}
            for row in range(len(ids))
        ]

    def _further(self, request: ResolvedRequest) -> Iterator[tuple[str, torch.Tensor]]:
        """The inputs that no text has a part in: one row [1, ...] float32 for all of the request's."""
        sides = {"width": request.width, "height": request.height}
        if self._how.time_ids:
            numbers = [sides[one] if isinstance(one, str) else one for one in self._how.time_ids]
            yield _TIME_IDS, torch.tensor([numbers], dtype=torch.float32)
        if self._how.guidance_embedding:
            yield _GUIDANCE, embedded_guidance(request.guidance_scale, self._how.guidance_embedding)


def embedded_guidance(scale: float, width: int) -> torch.Tensor:
    """The guidance scale as an input [1, width] float32 of a UNet that was distilled for it (Meng et al. 2023).

    Sines, then cosines of w = 1000 (s - 1) at falling frequencies; in diffusers' order of operations, since w is so
    large that float32 would show another.
    """
    half = width // 2
    w = torch.tensor([scale - 1]) * 1000
    f = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    waves = w[:, None] * f
    return torch.cat([waves.sin(), waves.cos(), torch.zeros(1, width % 2)], dim=1)


def _check_inputs(manifest: Manifest) -> None:
    how = manifest.conditioning
    made = {
        "sample": True,
        "timestep": True,
        HIDDEN_STATES: True,
        _TEXT_EMBEDS: bool(how.text_embeds),
        _TIME_IDS: bool(how.time_ids),
        _GUIDANCE: bool(how.guidance_embedding),
    }
    supplied = {name for name, is_made in made.items() if is_made}
    taken = {one.name for one in manifest.components[UNET].inputs}
    if supplied != taken:
        raise ValueError(
            f"the UNet of {manifest.name} takes {', '.join(sorted(taken))}, and its manifest says how to make "
            f"{', '.join(sorted(supplied))}; export it again with this version"
        )
