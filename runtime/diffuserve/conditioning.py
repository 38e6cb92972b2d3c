"""Requests -> the UNet's inputs beside its latents and timesteps, as a manifest's `Conditioning` says.

No family is named here: the manifest has which inputs there are, and what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import torch

from diffuserve.components import ComponentRunner
from diffuserve.engine import HIDDEN_STATES
from diffuserve.lora.choice import LoraKey
from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Manifest
from diffuserve.prompts import EmbeddingFolder, PromptReader, Reading, Text
from diffuserve.request import ResolvedRequest
from diffuserve.spec import CLIP_SKIP, CONTROL, CONTROL_SCALE, EMBEDDINGS, INPUT_IDS, UNET
from diffuserve.text_encoding import TextEncoder, WindowKey, emphasized

__all__ = ["Conditioner", "embedded_guidance"]

_TEXT_EMBEDS: Final = "text_embeds"
_TIME_IDS: Final = "time_ids"
_GUIDANCE: Final = "timestep_cond"
_HIDDEN, _POOLED = "hidden_states", "pooled"
_ENCODER_INPUTS: Final = {INPUT_IDS, CLIP_SKIP, EMBEDDINGS}

_Outputs = Mapping[WindowKey, Mapping[str, torch.Tensor]]


class Conditioner:
    """Conditioning of one checkpoint. `folder` is the manifest's.

    Raises OSError or ValueError where a tokenizer cannot be read, or where a component takes other inputs than are
    made for it.
    """

    def __init__(self, manifest: Manifest, folder: Path, runner: ComponentRunner, embeddings: EmbeddingFolder) -> None:
        self._how = manifest.conditioning
        _check_inputs(manifest)
        #: What the text encoders read of a request's prompts.
        self.read = PromptReader(manifest, folder, embeddings)
        size = manifest.size.opt
        self._encoders = {
            one.component: TextEncoder(
                manifest.components[one.component],
                runner,
                (_HIDDEN, _POOLED) if one.component == self._how.text_embeds else (_HIDDEN,),
                one.vocabulary,
                manifest.max_rows(one.component, size, size),
            )
            for one in self._how.encoders
        }

    @property
    def max_windows(self) -> int:
        """How many windows of prompts every text encoder takes in one call."""
        return min(one.max_rows for one in self._encoders.values())

    def __call__(
        self, requests: Sequence[ResolvedRequest], trace: object | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """What the UNet is told for each of `requests`, by input name [request.rows, ...] float32.

        Their prompts, which were read when they came, are encoded together.
        """
        outputs = {name: self._encode(name, requests, trace) for name in self._encoders}
        told = []
        for request in requests:
            reading: Reading = request.reading
            hidden = [self._hidden(outputs, request, text) for text in reading.rows]
            inputs = {HIDDEN_STATES: _stacked(hidden)}
            if self._how.text_embeds:
                pooled = [self._pooled(outputs, request, text) for text in reading.rows]
                inputs[_TEXT_EMBEDS] = _stacked(pooled)
            inputs |= {name: row.expand(request.rows, -1) for name, row in self._further(request)}
            told.append(inputs)
        return told

    def _encode(self, name: str, requests: Sequence[ResolvedRequest], trace: object | None) -> _Outputs:
        """One encoder's answers to every window of all texts."""
        keys = [
            key for one in requests for text in one.reading.rows if text is not None for key in _keys(one, text, name)
        ]
        vectors = dict(chain.from_iterable(one.reading.vectors[name].items() for one in requests))
        adapters = {one.adapter.key: one.adapter.vectors[name] for one in requests if _adapter_of(one, name)}
        return self._encoders[name](keys, vectors, adapters, trace)

    def _hidden(
        self, outputs: Mapping[str, _Outputs], request: ResolvedRequest, text: Text | None
    ) -> torch.Tensor | None:
        """A text's windows end to end, its encoders side by side: [77 * chunks, D]."""
        if text is None:
            return None
        of_encoders = []
        for name, answers in outputs.items():
            windows = zip(_keys(request, text, name), text.windows[name], strict=True)
            of_encoders.append(
                torch.cat([emphasized(answers[key][_HIDDEN], window.weights) for key, window in windows])
            )
        return torch.cat(of_encoders, dim=-1)

    def _pooled(
        self, outputs: Mapping[str, _Outputs], request: ResolvedRequest, text: Text | None
    ) -> torch.Tensor | None:
        """Of a text's first window, as A1111; its weights have no part in it."""
        name = self._how.text_embeds
        return None if text is None or name is None else outputs[name][_keys(request, text, name)[0]][_POOLED]

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


def _adapter_of(request: ResolvedRequest, encoder: str) -> LoraKey:
    """What tells the adapter that changes this encoder for the request; empty where none does."""
    key: LoraKey = request.adapter.key if request.adapter and encoder in request.adapter.vectors else ()
    return key


def _keys(request: ResolvedRequest, text: Text, encoder: str) -> list[WindowKey]:
    adapter = _adapter_of(request, encoder)
    return [WindowKey(window.ids, text.clip_skip, adapter) for window in text.windows[encoder]]


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """A copy of a request's rows, with zeros for None: one that runs for long must not keep what others share."""
    given = next(row for row in rows if row is not None)  # a prompt is always encoded
    return torch.stack([torch.zeros_like(given) if row is None else row for row in rows])


def _check_inputs(manifest: Manifest) -> None:
    how = manifest.conditioning
    for encoder in how.encoders:
        found = {one.name for one in manifest.components[encoder.component].inputs}
        if found - _lora_inputs(manifest, encoder.component) != _ENCODER_INPUTS:
            raise ValueError(
                f"{encoder.component} of {manifest.name} takes {', '.join(sorted(found)) or 'nothing'}, and is given "
                f"{', '.join(sorted(_ENCODER_INPUTS))}; export it again with this version"
            )
    made = {
        "sample": True,
        "timestep": True,
        HIDDEN_STATES: True,
        _TEXT_EMBEDS: bool(how.text_embeds),
        _TIME_IDS: bool(how.time_ids),
        _GUIDANCE: bool(how.guidance_embedding),
        CONTROL: how.control,
        CONTROL_SCALE: how.control,
    }
    supplied = {name for name, is_made in made.items() if is_made} | _lora_inputs(manifest, UNET)
    taken = {one.name for one in manifest.components[UNET].inputs}
    if supplied != taken:
        raise ValueError(
            f"the UNet of {manifest.name} takes {', '.join(sorted(taken))}, and its manifest says how to make "
            f"{', '.join(sorted(supplied))}; export it again with this version"
        )


def _lora_inputs(manifest: Manifest, component: str) -> set[str]:
    return {LORA, LORA_INDEX} if manifest.components[component].lora else set()
