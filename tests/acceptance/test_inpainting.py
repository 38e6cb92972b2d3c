"""Every sampler with a mask, at three strengths, with UNets of four and of nine channels, against diffusers."""

from __future__ import annotations

import itertools

import pytest

from diffuserve.sampling import SAMPLERS
from integration.families import Families, torch_families
from integration.family_cases import Case, Served, difference, expected, serve

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("sd15", "sd15-inpaint", "sdxl", "sdxl-inpaint")
MASKED = [
    Case(name, sampler, steps=10, guidance=3.0, strength=strength, has_mask=True)
    for name, sampler, strength in itertools.product(NAMES, SAMPLERS, (0.3, 0.7, 1.0))
]
#: Whatever else may share their calls.
BESIDE = [
    *(Case(name, sampler, steps=10, guidance=3.0) for name in ("sd15", "sdxl") for sampler in SAMPLERS),
    *(Case(name, sampler, 10, 3.0, strength=0.7) for name in ("sd15", "sdxl") for sampler in SAMPLERS),
    *(Case(name, "heun", 7, strength=0.6, has_mask=True, width=96, height=48) for name in NAMES),
]


@pytest.fixture(scope="module")
def served(families: Families, one_thread: None) -> Served:
    """In two parts, since a server takes 256 pictures at a time."""
    first, second = (
        serve(*torch_families(families, names, families.root / f"{names[0]} deployed"), [*MASKED, *BESIDE])
        for names in (NAMES[:2], NAMES[2:])
    )
    return Served(first.rows | second.rows, first.types | second.types, first.pictures | second.pictures)


@pytest.mark.parametrize("case", [*MASKED, *BESIDE], ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: Case) -> None:
    found = difference(served.pictures[case], expected(families, case))
    print(f"{case}: {found}/255")
    assert found <= 2


def test_all_of_a_checkpoint_shared_calls(served: Served) -> None:
    rows = {name: 2 * sum(case.family == name and case.width == 64 for case in served.pictures) for name in NAMES}
    assert rows == {"sd15": 170, "sd15-inpaint": 102, "sdxl": 170, "sdxl-inpaint": 102}
    assert {name: max(calls) for name, calls in served.rows.items()} == dict.fromkeys(NAMES, 64)
