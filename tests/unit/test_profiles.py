"""What the runtime asks of an engine's profiles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve.manifest import Component, Deployment
from diffuserve.profiles import EngineFacts, Profile, Range
from diffuserve.spec import UNET, VAE_DECODER
from unit.fakes import write_deployment


def box(rows: int, side: int, activation_bytes: int = 0) -> Profile:
    sides = {"latent_height": Range(4, side, side), "latent_width": Range(4, side, side)}
    return Profile({"rows": Range(1, rows, rows), **sides}, activation_bytes)


def facts(builder: str = "tensorrt", devices: tuple[str, ...] = ("8.9",)) -> EngineFacts:
    return EngineFacts(
        builder=builder,
        version="10.13.0",
        precision="fp16",
        devices=devices,
        profiles=(box(64, 8, 100), box(16, 16, 90), box(4, 24, 110)),
        onnx_sha256="1",
        sha256="2",
        bytes=1000,
    )


@pytest.mark.parametrize(
    ("height", "width", "rows"), [(8, 8, 64), (8, 10, 16), (4, 24, 4), (16, 16, 16), (24, 24, 4), (25, 8, 0), (2, 8, 0)]
)
def test_the_rows_follow_from_the_size(height: int, width: int, rows: int) -> None:
    assert facts().max_rows({"latent_height": height, "latent_width": width}) == rows
    assert facts().max_rows({"latent_height": height, "latent_width": width, "rows": 99, "height": 7}) == rows


def test_a_server_of_plans_holds_every_context_and_the_rtx_component_one() -> None:
    assert facts().device_bytes == 1000 + 300
    assert facts("tensorrt-rtx", ("8.6", "8.9")).device_bytes == 500 + 110


def test_a_manifest_keeps_the_engine(tmp_path: Path) -> None:
    manifest = write_deployment(tmp_path, "x").manifest("x")
    assert manifest.max_rows(UNET, 64, 64) == 64
    unet = Component("x_unet", (), (), "0", 0, engine=facts())
    changed = dataclasses.replace(manifest, components={**manifest.components, UNET: unet})
    (Deployment.load(tmp_path).folder("x") / "manifest.json").write_text(changed.to_json())
    again = Deployment.load(tmp_path).manifest("x")
    assert again == changed
    assert [again.max_rows(UNET, side, 64) for side in (64, 128, 192)] == [64, 16, 4]


def test_an_autoencoder_without_an_engine_is_bounded_by_its_pixels(tmp_path: Path) -> None:
    manifest = write_deployment(tmp_path, "x", max_rows=9).manifest("x")
    found = [manifest.max_rows(VAE_DECODER, side, side) for side in (64, 512, 1024, 2048)]
    assert found == [9, 4, 1, 1]
    assert manifest.max_rows(UNET, 2048, 2048) == 9


def test_a_manifest_of_before_is_read(tmp_path: Path) -> None:
    deployment = write_deployment(tmp_path, "x")
    path = deployment.folder("x") / "manifest.json"
    raw = json.loads(path.read_text())
    for component in raw["components"].values():
        del component["engine"]
    path.write_text(json.dumps(raw))
    assert deployment.manifest("x").components[UNET].engine is None


def test_static_profiles_are_known() -> None:
    assert Profile({"rows": Range(4, 4, 4)}).is_static
    assert not box(4, 8).is_static


def test_a_range_refuses_what_is_outside_or_between() -> None:
    with pytest.raises(InvalidArgumentError, match="multiple of 4 from 8 to 16"):
        Range(8, 12, 16, step=4).check("width", 10)
    assert 12 in Range(8, 12, 16, step=4)
    assert 10 not in Range(8, 12, 16, step=4)


def test_calls_of_a_graph_s_size_are_padded_to_its_rows(tmp_path: Path) -> None:
    static = [
        Profile({"rows": Range(rows, rows, rows), "latent_height": Range(8, 8, 8), "latent_width": Range(8, 8, 8)})
        for rows in (4, 2)
    ]
    unet = Component(
        "x_unet", (), (), "0", 0, engine=dataclasses.replace(facts(), profiles=(*facts().profiles, *static))
    )
    manifest = write_deployment(tmp_path, "x").manifest("x")
    assert manifest.row_buckets(UNET, 64, 64) == ()
    manifest = dataclasses.replace(manifest, components={**manifest.components, UNET: unet})
    assert manifest.row_buckets(UNET, 64, 64) == (2, 4)
    assert manifest.row_buckets(UNET, 128, 64) == ()
