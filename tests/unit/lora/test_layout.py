"""The layout of an adapter's vector: every number has one place, and a manifest keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve.lora import LoraLayout, LoraTarget
from diffuserve.lora.layout import CONV, LINEAR, Layer, layout_of
from diffuserve.manifest import Deployment
from diffuserve.spec import TEXT_ENCODER, UNET
from unit.fakes import write_deployment

GROUPS = [
    [Layer("attn.to_q", LINEAR, 3, 5)],
    [Layer("attn.to_k", LINEAR, 7, 5), Layer("attn.to_v", LINEAR, 7, 6)],
    [Layer("proj_in", CONV, 4, 4)],
]
LAYOUT = layout_of(GROUPS, rank=2, adapters=9)


def test_downs_of_layers_that_read_the_same_lie_side_by_side() -> None:
    places = {one.path: (one.down, one.up) for one in LAYOUT.targets}
    assert places == {
        "attn.to_q": (0, 6),
        "attn.to_k": (16, 44),
        "attn.to_v": (30, 54),
        "proj_in": (66, 74),
    }


def test_every_number_of_an_adapter_has_one_place() -> None:
    assert LAYOUT.size == 2 * (3 + 5 + 7 + 5 + 7 + 6 + 4 + 4)
    vector = torch.zeros(LAYOUT.size)
    for factors in LAYOUT.factors(vector).values():
        factors.down[:] += 1
        factors.up[:] += 1
    assert (vector == 1).all()


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_factors_are_views_of_the_vector(make: Any) -> None:
    vector = make(LAYOUT.size)
    factors = LAYOUT.factors(vector)["proj_in"]
    assert (tuple(factors.down.shape), tuple(factors.up.shape)) == ((2, 4), (4, 2))
    factors.down[:1] = 3  # a LoRA of rank 1
    factors.up[:, :1] = 4
    again = LAYOUT.factors(vector)["proj_in"]
    assert ((again.up @ again.down) == 12).all()
    assert sum(map(bool, vector)) == 8


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"82 numbers, not of shape \[83\]"):
        LAYOUT.factors(torch.zeros(83))


@pytest.mark.parametrize("change", [{"down": 1}, {"up": 4}, {"in_features": 4}, {"path": "attn.to_k"}])
def test_factors_that_overlap_or_leave_gaps_are_refused(change: dict[str, Any]) -> None:
    targets = (dataclasses.replace(LAYOUT.targets[0], **change), *LAYOUT.targets[1:])
    with pytest.raises(ValueError, match=r"export again|twice"):
        LoraLayout(2, 9, targets)


@pytest.mark.parametrize(("rank", "adapters", "targets"), [(0, 9, LAYOUT.targets), (2, 0, LAYOUT.targets), (2, 9, ())])
def test_a_layout_without_room_is_refused(rank: int, adapters: int, targets: tuple[LoraTarget, ...]) -> None:
    with pytest.raises(ValueError, match="has no room"):
        LoraLayout(rank, adapters, targets)


def test_a_manifest_keeps_the_layout(tmp_path: Path) -> None:
    manifest = write_deployment(tmp_path, "x").manifest("x")
    assert all(one.lora is None for one in manifest.components.values())
    unet = dataclasses.replace(manifest.components[UNET], lora=LAYOUT)
    changed = dataclasses.replace(manifest, components={**manifest.components, UNET: unet})
    (Deployment.load(tmp_path).folder("x") / "manifest.json").write_text(changed.to_json())
    again = Deployment.load(tmp_path).manifest("x")
    assert again == changed
    assert again.components[UNET].lora == LAYOUT
    assert again.components[TEXT_ENCODER].lora is None
