"""Requests with a picture for the checkpoint's ControlNet, against diffusers' own pipelines with it.

torch's modules stand in for the graphs of SDXL's layout and of a UNet that is told masks; a real Triton serves the
shapes checkpoint with its ControlNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from conftest import ROOT
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, GenerateRequest, InvalidArgumentError, UnsupportedError
from integration.families import Families, exported_families
from integration.family_cases import CASES, CONTROL, Case, Served, difference, expected
from shapes_recipe.control import agreement, contradicted, posed, silhouette
from unit.pictures import SVG, encoded

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("inpaint-control", "sdxl-control")
IN_TRITON = [case for case in CASES if case.family == "sd15-control"]


@pytest.mark.parametrize("case", [case for case in CASES if case.family in NAMES], ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: Case) -> None:
    assert difference(served.pictures[case], expected(families, case)) <= 2


def test_another_control_or_scale_would_show(served: Served, families: Families) -> None:
    """What the comparisons above rest on."""
    for case in (one for one in CASES if one.family in NAMES and one.control):
        key = "image" if case.strength is None else "control_image"
        changes: list[dict[str, Any]] = [
            {key: CONTROL.transpose(Image.Transpose.ROTATE_180)},
            {"controlnet_conditioning_scale": 0.0},
            {"guess_mode": True},
        ]
        for changed in changes[: 2 if case.guidance == 1.0 else 3]:
            assert difference(served.pictures[case], expected(families, case, **changed)) > 5, (case, changed)


def test_rows_with_and_without_a_control_shared_their_calls(served: Served) -> None:
    assert {name: max(rows) for name, rows in served.rows.items()} == {
        "inpaint-control": 2 * 3,
        "sdxl-control": 2 * 5,  # one case has another size
    }


@pytest.fixture(scope="module")
def client_of_control(families: Families, deployment: Path) -> Iterator[Client]:
    out = ROOT / "build" / "deployments" / "control"  # made once, and again when the checkpoint or the export changes
    exported = exported_families(families, ["sd15-control"], out, deployment)
    options = ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            yield client


def asked_at_once(client: Client, requests: list[GenerateRequest]) -> list[Any]:
    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(client.generate, requests))
    return [np.asarray(one.image.convert("RGB")).astype(int) for one in results]


def test_a_real_triton_makes_diffusers_pictures(client_of_control: Client, client: Client, families: Families) -> None:
    """All of them at once. Without a control, or with the scale 0, it is the plain checkpoint's picture."""
    pictures = asked_at_once(client_of_control, [case.request for case in IN_TRITON])
    for case, picture in zip(IN_TRITON, pictures, strict=True):
        assert difference(picture, expected(families, case)) <= 2, case
    without = [(case, picture) for case, picture in zip(IN_TRITON, pictures, strict=True) if not case.control]
    assert len(without) == 2
    plain = [replace(case, family="shapes", control=None).request for case, _ in without]
    for (_, ours), theirs in zip(without, asked_at_once(client, plain), strict=True):
        assert difference(ours, theirs) <= 1


def test_pictures_follow_their_silhouettes(client_of_control: Client) -> None:
    """Also where the caption speaks of another shape; only its colours are then right."""
    rng, requests, scenes = default_rng(3), [], []
    for seed in range(6):
        one = posed(rng)
        scene = contradicted(one.scene, rng) if seed % 2 else one.scene
        request = GenerateRequest(prompt=scene.caption, seed=seed, control_image=encoded(silhouette(one)))
        requests += [request, replace(request, control_image=b"")]
        scenes.append(one)
    pictures = asked_at_once(client_of_control, requests)
    follow, alone = (
        [agreement(Image.fromarray(one.astype(np.uint8)), scene) for one, scene in zip(some, scenes, strict=True)]
        for some in (pictures[::2], pictures[1::2])
    )
    assert np.mean(follow) > 0.75
    assert np.mean(follow) > np.mean(alone) + 0.25


@pytest.mark.parametrize(
    ("given", "reason"),
    [(SVG, "control_image is no picture in PNG"), (encoded(CONTROL)[:-30], "control_image cannot be decoded")],
)
def test_bad_controls_are_refused_and_nothing_else_is_disturbed(
    client_of_control: Client, given: bytes, reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        client_of_control.generate("a ring", steps=1, control_image=given)
    assert client_of_control.generate("a ring", steps=1, control_image=encoded(CONTROL)).image.size == (96, 64)


def test_a_checkpoint_without_a_controlnet_says_so(client: Client) -> None:
    with pytest.raises(UnsupportedError, match="control_image is given, and shapes has no ControlNet"):
        client.generate("a ring", steps=1, control_image=encoded(CONTROL))
