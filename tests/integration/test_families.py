"""Each family through the whole service, against diffusers' own pipeline on the same checkpoint and seed.

torch's modules stand in for the graphs, which an export holds equal to them; tests/acceptance has the graphs.
"""

from __future__ import annotations

import pytest

from integration.families import Families, torch_families
from integration.family_cases import CASES, Case, Served, difference, expected, serve, usual

pytestmark = pytest.mark.usefixtures("one_thread")

#: SD1.5 is what every other test is about.
NAMES = ("sd21", "lcm", "sdxl", "turbo")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def served(families: Families, one_thread: None) -> Served:
    return serve(*torch_families(families, NAMES, families.root / "deployment"))


@pytest.mark.parametrize("case", [case for case in CASES if case.family in NAMES], ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: Case) -> None:
    assert difference(served.pictures[case], expected(families, case)) <= 2


def test_another_word_size_or_scale_would_show(served: Served, families: Families) -> None:
    """What the comparisons above rest on."""
    for family in ("sd21", "sdxl"):
        plain, negative, unguided = (served.pictures[case] for case in usual(family)[:3])
        assert min(difference(plain, negative), difference(plain, unguided), difference(negative, unguided)) > 10
    sdxl = Case("sdxl")
    for changed in ({"original_size": (32, 64)}, {"crops_coords_top_left": (8, 0)}, {"negative_prompt": ""}):
        assert difference(served.pictures[sdxl], expected(families, sdxl, **changed)) > 2
    lcm = Case("lcm", steps=None)
    assert difference(served.pictures[lcm], expected(families, lcm, guidance_scale=8.0)) > 2


def test_requests_of_a_checkpoint_and_size_shared_their_calls(served: Served) -> None:
    assert {name: max(rows) for name, rows in served.rows.items()} == {
        "sd21": 2 + 2 + 1 + 2 + 2,
        "sdxl": 2 + 2 + 1 + 2 + 2 + 2 + 2,
        "turbo": 1 + 1 + 2,
        "lcm": 1 + 1 + 1,
    }


def test_checkpoints_bring_their_steps_and_guidance(served: Served) -> None:
    asked = [Case("turbo", steps=None), Case("lcm", steps=None), Case("sdxl"), Case("sd21")]
    found = [(served.infos[case]["steps"], served.infos[case]["guidance_scale"]) for case in asked]
    assert found == [(4, 0.0), (4, 8.5), (6, 5.0), (6, 7.5)]
