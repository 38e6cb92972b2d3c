"""Rows with different LoRAs, several and none in one batch, against diffusers with the same adapters and weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

from integration.families import Families, torch_families
from integration.family_cases import Served, difference, serve
from integration.lora_cases import (
    NEGATIVE,
    LoraCase,
    factors_of,
    kohya,
    named_by_diffusers,
    original_unet,
    pictured,
    put_lora,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 8
#: In all of them every row is in the same calls.
CASES = [
    LoraCase("sd15"),
    LoraCase("sd15", ("first",), NEGATIVE),
    LoraCase("sd15", ("second:0.7",)),
    LoraCase("sd15", ("first:0.5", "second:0.5"), NEGATIVE, seed=11),
    LoraCase("sd15", ("second:0.5", "FIRST:0.5"), NEGATIVE, seed=5),
    LoraCase("sd15", ("first:-1",), guidance=1.0),
    LoraCase("sd15", ("words",)),
    LoraCase("sd15", ("first:0",), seed=11),
    LoraCase("sdxl"),
    LoraCase("sdxl", ("large",), NEGATIVE),
    LoraCase("sdxl", ("large:0.5", "other:-0.5")),
    LoraCase("sd15-control", ("first",), NEGATIVE),
    LoraCase("sd15-control", control=1.0),
    LoraCase("sd15-control", ("first",), NEGATIVE, control=1.0),
    LoraCase("sd15-control", ("second:0.5", "words:0.5"), guidance=1.0, control=0.6),
    LoraCase("sd15-control", ("first",), control=0.0, seed=11),
    LoraCase("sd15-control"),
]
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PIPELINES["sd15-control"] = PIPELINES["sd15"]
WITH_CONTROLNET = "StableDiffusionControlNetPipeline"


@pytest.fixture(scope="module")
def served_and_files(families: Families, one_thread: None) -> tuple[Served, Mapping[str, Path]]:
    deployment, models = torch_families(families, tuple(PIPELINES), families.root / "deployment", lora_rank=RANK)
    small, large = deployment.manifest("sd15"), deployment.manifest("sdxl")
    both = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    made = {
        "first": named_by_diffusers(factors_of(small, 1)),
        "second": kohya(factors_of(small, 2, rank=2), alpha=1.0),
        "words": named_by_diffusers(factors_of(small, 3, components=["text_encoder"], size=1.0)),
        "large": original_unet(kohya(factors_of(large, 4), 2.0, both), layers=1),
        "other": named_by_diffusers(factors_of(large, 5)),
    }
    files = {name: put_lora(deployment.loras, name, tensors) for name, tensors in made.items()}
    return serve(deployment, models, CASES), files | {name.upper(): path for name, path in files.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_diffusers_picture(
    served_and_files: tuple[Served, Mapping[str, Path]], families: Families, case: LoraCase
) -> None:
    served, files = served_and_files
    pipeline = families.pipeline(case.family, PIPELINES[case.family] if case.control is None else WITH_CONTROLNET)
    assert difference(served.pictures[case], pictured(pipeline, case, files)) <= 2


def test_every_row_was_in_one_batch(served_and_files: tuple[Served, Mapping[str, Path]]) -> None:
    served, _ = served_and_files
    assert {name: max(rows) for name, rows in served.rows.items()} == {
        "sd15": 2 * 8 - 1,
        "sdxl": 2 * 3,
        "sd15-control": 2 * 6 - 1,
    }


@pytest.mark.parametrize("family", ["sd15", "sd15-control"])
def test_another_adapter_or_control_would_show(
    served_and_files: tuple[Served, Mapping[str, Path]], family: str
) -> None:
    served, _ = served_and_files
    alike = [case for case in CASES if case.family == family and case.seed == 3 and case.guidance > 1]
    pictures = [served.pictures[case] for case in alike]
    assert min(itertools.starmap(difference, itertools.combinations(pictures, 2))) > 5


def test_what_was_used_is_told(served_and_files: tuple[Served, Mapping[str, Path]]) -> None:
    served, _ = served_and_files
    info = served.infos[CASES[3]]
    assert info["loras"] == ["first:0.5", "second:0.5"]
    told = [(one["name"], one["weight"], one["rank"], one["truncated"]) for one in info["lora_files"]]
    assert told == [("first", 0.5, 4, False), ("second", 0.5, 2, False)]
    assert len({one["digest"] for one in info["lora_files"]}) == 2
    assert (served.infos[CASES[0]]["loras"], served.infos[CASES[0]]["lora_files"]) == ([], [])
