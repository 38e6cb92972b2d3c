"""A random SD1.x checkpoint and one export of it that the tests share."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffuserve.manifest import LatentColours, Manifest
from diffuserve_export import ExportOptions, Report, assembly, export_checkpoint
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.graphs import Graph
from diffuserve_export.ports import ports_of
from diffuserve_export.verify import Verified
from unit.export.pipelines import random_pipeline


class Recorder(Report):
    """Keeps what an export said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[tuple[str, str]] = []
        self.results: list[Verified] = []

    def stage(self, component: str, stage: str) -> None:
        self.stages.append((component, stage))

    def verified(self, results: list[Verified]) -> None:
        self.results += results

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def without_logs() -> Iterator[None]:
    """pytest listens to every logger, and torch's tracer writes down each guess about a shape where somebody does."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def float32_graph(checkpoint: Checkpoint, component: str, path: Path) -> Graph:
    """Of a file that was not made from the checkpoint just now; its latents have no colours."""
    colours = LatentColours(((0.0,) * checkpoint.latent_channels,) * 3, (0.0,) * 3)
    return Graph(path, ports_of(checkpoint)[component], "fp32", (), colours=colours)


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    out: Path
    manifest: Manifest
    report: Recorder

    def graph(self, component: str) -> Path:
        return self.out / "models" / f"tiny_{component}" / "1" / "model.onnx"


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in fp16, as checkpoints usually are. Not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    random_pipeline().to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def exported(saved_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The one export that really runs torch's exporter. Not to be written to."""
    out, report = tmp_path_factory.mktemp("exported") / "deployment", Recorder()
    with without_logs():
        manifest = export_checkpoint(ExportOptions(checkpoint=str(saved_checkpoint), out=out), report)
    return Exported(saved_checkpoint, out, manifest, report)


@pytest.fixture
def checkpoint(saved_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved_checkpoint, tmp_path / "tiny")


@pytest.fixture
def graphs_from_store(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports copy the shared graphs instead of tracing again, and verify nothing."""

    def copy(plan: Any, component: str, path: Path, report: Any) -> Graph:
        report.stage(component, "loading")
        shutil.copyfile(exported.graph(component), path)
        return replace(float32_graph(plan.checkpoint, component, path), colours=exported.manifest.colours)

    monkeypatch.setattr(assembly, "graph_from_component", copy)
