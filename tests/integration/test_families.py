"""Each family through the whole service, against diffusers' own pipeline on the same checkpoint and seed.

torch's modules stand in for the graphs, which an export holds equal to them; tests/acceptance has the graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from integration.families import Families
from integration.family_cases import CASES, Case, Served, difference, expected, usual
from unit.pictures import mask, picture

pytestmark = pytest.mark.usefixtures("one_thread")

#: SD1.5 is what every other test is about.
NAMES = ("sd15-inpaint", "sd21", "lcm", "sdxl", "sdxl-inpaint", "turbo")


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


def test_another_picture_or_mask_would_show(served: Served, families: Families) -> None:
    """At strength 1 a picture is seen by UNets alone that are told masks, and put back by the others."""
    told, put_back = (
        Case("sd15-inpaint", strength=1.0, has_mask=True),
        Case("sdxl", "Euler a", guidance=1.0, strength=1.0, has_mask=True, seed=11),
    )
    changes: dict[str, dict[str, Any]] = {
        "picture": {"image": picture().transpose(Image.Transpose.ROTATE_180)},
        "mask": {"mask_image": mask(box=(8, 16, 40, 40))},
        "strength": {"strength": 0.9},
    }
    for case in (told, put_back):
        for name, changed in changes.items():
            found = difference(served.pictures[case], expected(families, case, **changed))
            assert found > 10, (case, name, found)


def test_requests_of_a_checkpoint_and_size_shared_their_calls(served: Served) -> None:
    assert {name: max(rows) for name, rows in served.rows.items()} == {
        "sd15-inpaint": 2 + 2 + 1 + 2,
        "sd21": 2 + 2 + 1 + 2 + 2,
        "sdxl": 2 + 2 + 1 + 2 + 2 + 2 + 2 + (2 + 2 + 2 + 1),
        "sdxl-inpaint": 2 + 2 + 2,
        "turbo": 1 + 1 + 2,
        "lcm": 1 + 1 + 1 + 1,
    }


def test_checkpoints_bring_their_steps_and_guidance(served: Served) -> None:
    asked = [Case("turbo", steps=None), Case("lcm", steps=None), Case("sdxl"), Case("sd21")]
    found = [(served.infos[case]["steps"], served.infos[case]["guidance_scale"]) for case in asked]
    assert found == [(4, 0.0), (4, 8.5), (6, 5.0), (6, 7.5)]
