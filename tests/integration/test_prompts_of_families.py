"""Long, weighted, skipped and learnt prompts of each layout, all in one service, against diffusers.

torch's modules stand in for the graphs, which an export holds equal to them.
"""

from __future__ import annotations

import itertools

import pytest

from integration.families import Families, torch_families
from integration.family_cases import Served, difference, serve
from integration.prompt_cases import CASES as ALL
from integration.prompt_cases import PromptCase, expected, put_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")

#: SD1.5's go through a real Triton, in test_prompts.
NAMES = ("sd21", "sdxl")
CASES = [case for case in ALL if case.family in NAMES]


@pytest.fixture(scope="module")
def served(families: Families, one_thread: None) -> Served:
    deployment, models = torch_families(families, NAMES, families.root / "deployment")
    put_embeddings(deployment.embeddings, large="sdxl")
    return serve(deployment, models, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: PromptCase) -> None:
    name = "StableDiffusionXLPipeline" if case.family == "sdxl" else "StableDiffusionPipeline"
    assert difference(served.pictures[case], expected(families.pipeline(case.family, name), case)) <= 2


def test_another_reading_would_show(served: Served) -> None:
    """What the comparisons above rest on: no two requests are the same picture."""
    for family in NAMES:
        pictures = [served.pictures[case] for case in CASES if case.family == family]
        assert min(itertools.starmap(difference, itertools.combinations(pictures, 2))) > 2


def test_prompts_of_all_lengths_shared_their_calls(served: Served) -> None:
    assert {name: max(rows) for name, rows in served.rows.items()} == {
        name: 2 * sum(case.family == name for case in CASES) for name in NAMES
    }
    assert {served.infos[case]["prompt_chunks"] for case in CASES} == {1, 2}
