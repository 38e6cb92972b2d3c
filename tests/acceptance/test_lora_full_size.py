"""SD1.5 at its full size takes LoRA adapters of rank 16 in TensorRT-RTX engines.

Needs two cores, 12 GB and 10 GB of disk, and no GPU; some 15 minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.full_size import check, exported, measured
from acceptance.tensorrt_report import FOLDER, publish
from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Manifest
from diffuserve.spec import TEXT_ENCODER, UNET
from measure.tables import table

RANK = 16
NAME = "full-size sd15 with LoRA"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = FOLDER / "sd15-lora"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    monkeypatch.setenv("DIFFUSERVE_CACHE", str(root / "cache"))
    yield root
    shutil.rmtree(root)


def test_a_full_size_export_with_adapters(folder: Path) -> None:
    run, manifest = exported(["FAMILY=sd15", "RANDOM_WEIGHTS=1", f"LORA_RANK={RANK}"], folder / "deployment", "sd15")
    publish(NAME, f"{measured(run, manifest)}\n\n{layouts(manifest)}", by="make accept-sharing")
    check(run, manifest, folder / "deployment")
    for name in (TEXT_ENCODER, UNET):
        component = manifest.components[name]
        assert component.lora is not None
        assert component.lora.rank == RANK
        assert component.engine is not None
        for profile in component.engine.profiles:
            assert profile.takes({"adapters": 1})
            assert profile.takes({"adapters": component.lora.adapters})
        shapes = {one.name: one.shape for one in component.inputs}
        assert shapes[LORA] == ("adapters", component.lora.size)
        assert shapes[LORA_INDEX] == ("rows",)


def layouts(manifest: Manifest) -> str:
    """What adapters are to each component, in Markdown."""
    heads = ("component", "rank", "layers", "P", "an adapter in fp16, MB", "adapters of a call, at most")
    rows = [
        (
            name,
            str(one.lora.rank),
            str(len(one.lora.targets)),
            f"{one.lora.size:,}",
            f"{one.lora.size * 2 / 1e6:.1f}",
            str(one.lora.adapters),
        )
        for name, one in manifest.components.items()
        if one.lora
    ]
    return table(heads, rows)
