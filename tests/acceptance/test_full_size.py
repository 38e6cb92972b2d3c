"""Full-size models with random weights become TensorRT-RTX engines by one command each, in bounded memory and time.

Needs two cores, 24 GB and 20 GB of disk, and no GPU. Small models go the same way first: what is wrong with the way
shows within two minutes. What was measured goes to build/accept-tensorrt/report.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.full_size import check, exported, measured
from acceptance.tensorrt_report import FOLDER, publish
from conftest import CHECKPOINT
from unit.export.pipelines import random_pipeline

MOST_MEMORY = 20e9
MOST_SECONDS = 1800


@pytest.fixture
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For the deployment and the engines' cache, which hold each engine once together; gone afterwards."""
    root = FOLDER / str(request.node.callspec.id)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    monkeypatch.setenv("DIFFUSERVE_CACHE", str(root / "cache"))
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_small_export(family: str, folder: Path) -> None:
    checkpoint = CHECKPOINT
    if family == "sdxl":
        checkpoint = folder / "small"
        random_pipeline(family).save_pretrained(checkpoint, safe_serialization=True)
    run, manifest = exported([f"CHECKPOINT={checkpoint}", "NAME=small"], folder / "deployment", "small")
    assert manifest.family == family
    check(run, manifest, folder / "deployment")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_full_size_export(family: str, folder: Path) -> None:
    run, manifest = exported([f"FAMILY={family}", "RANDOM_WEIGHTS=1"], folder / "deployment", family)
    publish(f"full-size {family}", measured(run, manifest))
    check(run, manifest, folder / "deployment")
    assert run.peak <= MOST_MEMORY
    assert run.seconds <= MOST_SECONDS
