"""Requests -> the UNet's inputs beside its latents and timesteps, as a manifest's `Conditioning` says.

No family is named here: the manifest has which inputs there are, and what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Conditioned:
    """What the UNet is told for one request, by input name [request.rows, ...] float32.

    `tokens_cut` is how many tokens of the prompt did not fit.
    """

    inputs: dict[str, torch.Tensor]
    tokens_cut: int


@dataclass(frozen=True, slots=True)
class _Encoder:
    component: Component
    tokenizer: PromptTokenizer


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
                manifest.components[one.component], PromptTokenizer(folder / one.tokenizer, manifest.token_limit)
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
        encoder, rows = self._encoders[name], dict[tuple[int, ...], int]()
        read = [None if text is None else encoder.tokenizer(text) for text in texts]
        # Each text once: many requests share their negative prompt. -1 is the last row, which is made of zeros.
        row_of = [-1 if one is None else rows.setdefault(tuple(one.ids[0].tolist()), len(rows)) for one in read]
        ids = torch.tensor(list(rows), dtype=torch.int32)
        outputs = self._runner.run(encoder.component, {"input_ids": ids}, trace=trace)

        def of_texts(output: torch.Tensor) -> torch.Tensor:
            # The rows are copied: they are kept for as long as the request runs, and the component's memory is lent.
            encodings = check_rows(encoder.component, output, len(rows)).to(torch.float32)
            return torch.cat([encodings, torch.zeros_like(encodings[:1])])[row_of]

        wanted = ("hidden_states", "pooled") if name == self._how.text_embeds else ("hidden_states",)
        cut = [0 if one is None else one.tokens_cut for one in read]
        return _Encoded({output: of_texts(outputs[output]) for output in wanted}, cut)

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
