"""Prompts that are more than 77 plain tokens, and diffusers' pictures for them.

diffusers reads one window of a text encoder and no syntax. What it is to draw is therefore encoded here, window by
window with transformers, from tokens and weights that each case spells out, and given to its pipelines as
`prompt_embeds`; where it can read a request itself (`clip_skip`, textual inversion), it does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from diffuserve.request import GenerateRequest

__all__ = ["CASES", "LEARNT", "LONG", "PromptCase", "encoded", "expected", "put_embeddings", "read_by_diffusers"]

#: Words and their weight, window by window.
Windows = tuple[tuple[tuple[str, float], ...], ...]

LEARNT = "zx-ring"
LONG = "a large red circle on a blue background, " * 16 + "a small green ring on white"  # 9 tokens each, and 6
_EMPTY: Windows = ((("", 1.0),),)
VECTORS = 2


@dataclass(frozen=True)
class PromptCase:
    """A request, and what its prompts are. None: diffusers reads them itself."""

    family: str
    name: str
    prompt: str
    negative: str = ""
    syntax: str = "plain"
    clip_skip: int = 0
    windows: Windows | None = None
    negative_windows: Windows = _EMPTY
    seed: int = 3

    @property
    def request(self) -> GenerateRequest:
        return GenerateRequest(
            prompt=self.prompt,
            negative_prompt=self.negative,
            prompt_syntax=self.syntax,
            clip_skip=self.clip_skip,
            checkpoint=self.family,
            steps=5,
            guidance_scale=3.0,
            seed=self.seed,
        )

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


def _cases(family: str, skips: Sequence[int]) -> list[PromptCase]:
    long_words = LONG.split()
    # A comma is a token of its own: 75 tokens are eight sentences of nine and three words more.
    first = " ".join(long_words[: 8 * 8 + 3])
    rest = " ".join(long_words[8 * 8 + 3 :])
    a_ring = (("a (", 1.0), ("small", 1.3), (") ring", 1.0))
    return [
        PromptCase(family, "short", "a large red circle"),
        PromptCase(family, "short negative", "a large red circle", "a small green ring"),
        PromptCase(family, "150 tokens", LONG, windows=(((first, 1.0),), ((rest, 1.0),)), negative_windows=_EMPTY * 2),
        PromptCase(
            family,
            "long negative",
            "a small green ring",
            LONG,
            windows=((("a small green ring", 1.0),), *_EMPTY),
            negative_windows=(((first, 1.0),), ((rest, 1.0),)),
        ),
        *(PromptCase(family, f"clip_skip {n}", "a large red circle", "a ring", clip_skip=n) for n in skips),
        PromptCase(
            family,
            "weights and BREAK",
            r"a (large:1.4) [red] circle BREAK on a ((blue)) background",
            r"a \((small:1.3)\) ring",
            "a1111",
            clip_skip=1,
            windows=(
                (("a", 1.0), ("large", 1.4), ("red", 1 / 1.1), ("circle", 1.0)),
                (("on a", 1.0), ("blue", 1.1 * 1.1), ("background", 1.0)),
            ),
            negative_windows=(a_ring, *_EMPTY),
        ),
        PromptCase(family, "learnt word", f"a large {LEARNT} circle", f"<{LEARNT}>"),
        PromptCase(
            family,
            "learnt word with a weight",
            f"a large ({LEARNT}:1.5) circle BREAK red",
            "a ring",
            "a1111",
            windows=((("a large", 1.0), (LEARNT, 1.5), ("circle", 1.0)), (("red", 1.0),)),
            negative_windows=((("a ring", 1.0),), *_EMPTY),
        ),
    ]


CASES = [*_cases("sd15", (1, 2)), *_cases("sd21", (1, 2)), *_cases("sdxl", (1,))]


def put_embeddings(folder: Path, large: str | None = None) -> None:
    """The learnt word for encoders of width 64 and, in the folder `large`, for SDXL's of 16 and 24."""
    folder.mkdir(exist_ok=True)
    save_file({"emb_params": _vectors(64)}, folder / f"{LEARNT}.safetensors")
    if large:
        (folder / large).mkdir(exist_ok=True)
        save_file({"clip_l": _vectors(16), "clip_g": _vectors(24)}, folder / large / f"{LEARNT}.safetensors")


def _vectors(width: int) -> torch.Tensor:
    return torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(width)) / 4


def _learnt(pipeline: Any) -> Any:
    """A copy of the pipeline that knows the learnt word, by diffusers' own loader."""
    parts: dict[str, Any] = dict(pipeline.components)
    encoders = [name for name in parts if name.startswith("text_encoder")]
    for name in encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts |= {one: copy.deepcopy(parts[one]) for one in (name, tokenizer)}
        # transformers would take a new word for the prompt's end where a config has the end from before a correction.
        getattr(parts[name], "text_model", parts[name]).eos_token_id = 49407
    more = {} if len(encoders) > 1 else {"requires_safety_checker": False}
    made = type(pipeline)(**parts, **more)
    made.set_progress_bar_config(disable=True)
    for name in encoders:
        tokenizer, encoder = parts[name.replace("text_encoder", "tokenizer")], parts[name]
        vectors = {f"<{LEARNT}>": _vectors(encoder.config.hidden_size)}
        made.load_textual_inversion(vectors, tokenizer=tokenizer, text_encoder=encoder)
    return made


def expected(pipeline: Any, case: PromptCase) -> Any:
    """diffusers' picture for the case."""
    if LEARNT in case.prompt:
        pipeline = _learnt(pipeline)
    if case.windows is None:
        return read_by_diffusers(pipeline, case)
    windows = [case.windows, case.negative_windows]
    skips = [case.clip_skip, case.clip_skip if case.syntax == "a1111" else 0]
    pairs = [encoded(pipeline, one, skip) for one, skip in zip(windows, skips, strict=True)]
    (prompt, pooled), (negative, negative_pooled) = pairs
    if pooled is None:
        return _drawn(pipeline, case, prompt_embeds=prompt, negative_prompt_embeds=negative)
    if not case.negative:  # as diffusers, where none is given
        negative, negative_pooled = torch.zeros_like(negative), torch.zeros_like(pooled)
    return _drawn(
        pipeline,
        case,
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def read_by_diffusers(pipeline: Any, case: PromptCase) -> Any:
    prompt, negative = (text.replace(f"<{LEARNT}>", LEARNT) for text in (case.prompt, case.negative))
    with pytest.MonkeyPatch.context() as patched:
        # diffusers looks for the final layer norm where transformers had it before its version 5.
        patched.setattr(CLIPTextModel, "text_model", property(lambda model: model), raising=False)
        return _drawn(
            pipeline,
            case,
            prompt=prompt.replace(LEARNT, f"<{LEARNT}>"),
            negative_prompt=negative.replace(LEARNT, f"<{LEARNT}>") or None,
            clip_skip=case.clip_skip or None,
        )


def _drawn(pipeline: Any, case: PromptCase, **prompts: Any) -> Any:
    request = case.request
    (image,) = pipeline(
        **prompts,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(request.seed),
    ).images
    return np.asarray(image).astype(int)


def encoded(pipeline: Any, windows: Windows, clip_skip: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`prompt_embeds` [1, 77 * windows, D], and `pooled_prompt_embeds` [1, D] of the first window."""
    parts = pipeline.components
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    states, pooled = [], None
    for name in encoders:
        outputs = [
            _window(parts[name], parts[name.replace("text_encoder", "tokenizer")], window, clip_skip, len(encoders) > 1)
            for window in windows
        ]
        states.append(torch.cat([hidden for hidden, _ in outputs], dim=1))
        pooled = outputs[0][1]
    return torch.cat(states, dim=-1), pooled


@torch.no_grad()
def _window(
    encoder: Any, tokenizer: Any, words: Sequence[tuple[str, float]], clip_skip: int, is_large: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in words:
        named = f"<{LEARNT}> <{LEARNT}>_1" if text == LEARNT else text
        own = tokenizer(named, add_special_tokens=False).input_ids
        ids, weights = ids + own, weights + [weight] * len(own)
    ids = [*ids, tokenizer.eos_token_id]
    assert len(ids) <= 77
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    weights += [1.0] * (77 - len(weights))
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    if is_large:
        hidden = output.hidden_states[-2 - clip_skip]
    else:
        hidden = encoder.final_layer_norm(output.hidden_states[-1 - clip_skip])
    if set(weights) != {1.0}:
        weighted = hidden * torch.tensor(weights)[None, :, None]
        hidden = weighted * (hidden.mean() / weighted.mean())
    return hidden, output.get("text_embeds")
