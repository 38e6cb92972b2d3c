"""Long, weighted, skipped and learnt prompts at the real server, against diffusers; and what it refuses."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffuserve_client import Client, InvalidArgumentError, UnsupportedError
from integration.family_cases import difference
from integration.prompt_cases import CASES, LEARNT, LONG, PromptCase, expected, put_embeddings

OWN = [case for case in CASES if case.family == "sd15"]


@pytest.fixture(scope="module")
def served(client: Client, embeddings: Path) -> Iterator[dict[PromptCase, Any]]:
    """Every case's picture and what was told of it, all asked for at once; the learnt word comes while it serves."""
    assert client.generate(f"a {LEARNT}", steps=1).images[0].info["embeddings"] == []
    put_embeddings(embeddings)
    with ThreadPoolExecutor(len(OWN)) as pool:
        images = pool.map(lambda case: client.generate(replace(case.request, checkpoint=None)).images[0], OWN)
        yield dict(zip(OWN, images, strict=True))


@pytest.mark.parametrize("case", OWN, ids=str)
def test_it_is_diffusers_picture(served: dict[PromptCase, Any], pipeline: Any, case: PromptCase) -> None:
    assert difference(np.asarray(served[case].image).astype(int), expected(pipeline, case)) <= 2


def test_another_reading_would_show(served: dict[PromptCase, Any]) -> None:
    pictures = [np.asarray(one.image).astype(int) for one in served.values()]
    assert min(itertools.starmap(difference, itertools.combinations(pictures, 2))) > 2


def test_what_was_read_is_told(served: dict[PromptCase, Any], pipeline: Any) -> None:
    assert len(pipeline.tokenizer(LONG, add_special_tokens=False).input_ids) == 150
    infos = {case.name: served[case].info for case in OWN}
    assert (infos["150 tokens"]["prompt_chunks"], infos["short"]["prompt_chunks"]) == (2, 1)
    assert infos["learnt word"]["embeddings"][0].startswith(f"{LEARNT}:")
    assert (infos["weights and BREAK"]["prompt_syntax"], infos["weights and BREAK"]["clip_skip"]) == ("a1111", 1)


def _put_bad(folder: Path) -> None:
    save_file({"a": torch.ones(1, 32)}, folder / "zx-narrow.safetensors")
    save_file({"a": torch.full((1, 64), float("nan"))}, folder / "zx-nan.safetensors")
    (folder / "zx-pickle.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "zx-torn.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (
            {"prompt": "red " * 451},
            InvalidArgumentError,
            "prompt takes 7 windows of 75 tokens, and at most 6 .* shorten",
        ),
        ({"prompt": "a", "clip_skip": 3}, InvalidArgumentError, "clip_skip is 3, and .* have 2 layers .* at most 2"),
        (
            {"prompt": "(" * 8000 + "x", "prompt_syntax": "a1111"},
            InvalidArgumentError,
            "weight of 'x' is inf, and must",
        ),
        ({"prompt": "(" * 10_000, "prompt_syntax": "a1111"}, InvalidArgumentError, "prompt has 10000 bytes"),
        ({"prompt": "(x:9e9) (y:99)", "prompt_syntax": "a1111"}, InvalidArgumentError, "weight of 'y' is 99, and must"),
        ({"prompt": "[a:b:0.5]", "prompt_syntax": "a1111"}, UnsupportedError, "do not change on the way; choose one"),
        ({"prompt": "a", "prompt_syntax": "comfy"}, InvalidArgumentError, "must be one of plain, a1111"),
        (
            {"prompt": "a zx-narrow"},
            InvalidArgumentError,
            "zx-narrow has vectors of width 32, and .* takes 64; use one",
        ),
        ({"prompt": "a zx-nan"}, InvalidArgumentError, r"zx-nan\.safetensors has values that are not finite"),
        ({"prompt": "a zx-pickle"}, InvalidArgumentError, r"zx-pickle\.pt is pickled, which can run code"),
        ({"prompt": "a", "negative_prompt": "zx-torn"}, InvalidArgumentError, "zx-torn.* is no safetensors file"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_else_is_disturbed(
    client: Client, embeddings: Path, values: dict[str, Any], kind: type[Exception], said: str
) -> None:
    _put_bad(embeddings)
    reached, refused = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        assert refused.wait(60)

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(client.generate, "a circle", steps=8, seed=5, on_progress=hold)
        assert reached.wait(60)
        with pytest.raises(kind, match=said):
            client.generate(**values, steps=2)
        refused.set()
        picture = beside.result(60).image
    alone = client.generate("a circle", steps=8, seed=5).image
    assert difference(np.asarray(picture).astype(int), np.asarray(alone).astype(int)) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "(((red [" + "circle, " * 148 + ")]]", "prompt_syntax": "a1111"},
        {"prompt": "(x:1e30) (x:nan) ]]))", "prompt_syntax": "a1111"},
        {"prompt": f"<../{LEARNT}> ../zx-nan/../../etc/passwd /etc/passwd.safetensors"},
        {"prompt": "red " * 450, "negative_prompt": "blue " * 226},
    ],
)
def test_odd_prompts_are_read(client: Client, values: dict[str, Any]) -> None:
    values = {**values, "prompt": values["prompt"].replace("zx-nan", "nothing")}
    assert client.generate(**values, steps=1).image.size == (64, 64)
