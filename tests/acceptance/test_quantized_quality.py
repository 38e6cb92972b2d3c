"""A thousand pictures of the shapes checkpoint in each precision, judged by its oracle, beside the same in float32.

Every graph is exported, built into an engine by TensorRT-RTX, and run in ONNX Runtime. What was found goes to
build/accept-tensorrt/report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from acceptance.tensorrt_report import publish
from conftest import CHECKPOINT
from diffuserve.engine_files import read_facts
from diffuserve.manifest import Deployment
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, Report, graphs
from diffuserve_export.engines import EngineOptions
from diffuserve_export.engines.model import GpuModel, gpu_model_from_onnx
from diffuserve_export.engines.profiles import ShapeRanges
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.quantize.pictures import Run, Studio
from diffuserve_export.quantize.quality import psnr
from diffuserve_export.quantize.unet import graph_run
from measure.tables import table
from shapes_recipe.evaluate import choose
from shapes_recipe.oracle import judge
from shapes_recipe.world import Scene, all_scenes
from unit.export.conftest import without_logs

PICTURES = 1000
STEPS = 20
SIZE = 64
SEED = 20261122
LARGEST_FALL = 0.01
HEADS = ("precision", "right", "PSNR, dB", "lowest", "graph, MB", "engine, MB")
#: Of the table; each test adds its own.
ROWS: list[tuple[str, ...]] = []


@dataclass(frozen=True)
class Drawn:
    """A picture of each scene, from the noise of its own seed, and whether the oracle sees the scene in it."""

    pictures: Tensor
    right: Sequence[bool]

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.right))


def plan(precision: str) -> Plan:
    engine = EngineOptions(compute_capability="89")
    return plan_export(
        ExportOptions(
            checkpoint=str(CHECKPOINT), out=Path("unused"), target="tensorrt-rtx", precision=precision, engine=engine
        )
    )


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return choose(all_scenes(), PICTURES, SEED)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(plan("fp16").checkpoint, SIZE, STEPS)


def draw(studio: Studio, run: Run, scenes: Sequence[Scene]) -> Drawn:
    pictures = studio.pictures(run, [scene.caption for scene in scenes], range(SEED, SEED + len(scenes)))
    arrays = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return Drawn(pictures, [judge(one).matches(scene) for one, scene in zip(arrays, scenes, strict=True)])


@pytest.fixture(scope="module")
def float32(deployment: Path, studio: Studio, scenes: list[Scene]) -> Drawn:
    component = Deployment.load(deployment).manifest("shapes").components[UNET]
    graph = deployment / "models" / component.model / "1" / "model.onnx"
    drawn = draw(studio, graph_run(graph, (component.inputs, component.outputs)), scenes)
    ROWS[:] = [("fp32", f"{drawn.accuracy:.1%}", "", "", f"{graph.stat().st_size / 1e6:.1f}", "")]
    return drawn


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "int4"])
def test_a_thousand_pictures_are_as_right_as_in_float32(
    precision: str, studio: Studio, scenes: list[Scene], float32: Drawn, tmp_path: Path
) -> None:
    planned, folder = plan(precision), tmp_path / f"shapes_{precision}"
    path = folder / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    with without_logs():
        graph = graphs.graph_from_component(planned, UNET, path, Report())
    drawn = draw(studio, graph_run(path, graph.ports), scenes)
    each, graph_bytes = psnr(drawn.pictures, float32.pictures), path.stat().st_size
    ranges = ShapeRanges(planned.size, planned.rows, planned.checkpoint.latent_scale, 77, {})
    model = GpuModel(planned.target, precision, UNET, graph.ports, ranges, planned.engine)
    gpu_model_from_onnx(folder, model, print)
    engine_bytes = read_facts(folder / "1").bytes
    figures = (f"{each.mean():.1f}", f"{each.min():.1f}", f"{graph_bytes / 1e6:.1f}", f"{engine_bytes / 1e6:.1f}")
    ROWS.append((precision, f"{drawn.accuracy:.1%}", *figures))
    publish("quantized pictures", f"{table(HEADS, ROWS)}\n\n{PICTURES} pictures of {SIZE} x {SIZE}, {STEPS} steps.")
    assert drawn.accuracy >= float32.accuracy - LARGEST_FALL
