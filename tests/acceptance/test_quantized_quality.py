"""A thousand pictures of the shapes checkpoint in each precision, judged by its oracle, beside the same in float32.

Every graph is exported, which has its pictures judged at the quality gate, built into an engine by TensorRT-RTX, and
run in ONNX Runtime. What was found goes to build/accept-tensorrt/report.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor

from acceptance.tensorrt_report import publish
from conftest import CHECKPOINT
from diffuserve.engine_files import read_facts
from diffuserve.manifest import Deployment
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, QualityError, Report, graphs
from diffuserve_export.engines import EngineOptions
from diffuserve_export.engines.model import GpuModel, gpu_model_from_onnx
from diffuserve_export.engines.profiles import ShapeRanges
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.graphs import Graph
from diffuserve_export.modules import module_of
from diffuserve_export.quantize.pictures import Run, Studio
from diffuserve_export.quantize.quality import psnr
from diffuserve_export.quantize.unet import Judge, graph_run, module_run
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


@pytest.fixture(scope="module", params=["fp16", "int8", "fp8", "int4"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = tmp_path_factory.mktemp("graphs") / f"shapes_{request.param}" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    with without_logs():
        return graphs.graph_from_component(plan(request.param), UNET, path, Report())


def test_a_thousand_pictures_are_as_right_as_in_float32(
    graph: Graph, studio: Studio, scenes: list[Scene], float32: Drawn, tmp_path: Path
) -> None:
    precision, drawn = graph.precision, draw(studio, graph_run(graph.path, graph.ports), scenes)
    each, graph_bytes = psnr(drawn.pictures, float32.pictures), graph.path.stat().st_size
    engine_bytes = built_bytes(graph, tmp_path)
    figures = (f"{each.mean():.1f}", f"{each.min():.1f}", f"{graph_bytes / 1e6:.1f}", f"{engine_bytes / 1e6:.1f}")
    ROWS.append((precision, f"{drawn.accuracy:.1%}", *figures))
    publish("quantized pictures", f"{table(HEADS, ROWS)}\n\n{PICTURES} pictures of {SIZE} x {SIZE}, {STEPS} steps.")
    assert drawn.accuracy >= float32.accuracy - LARGEST_FALL


def built_bytes(graph: Graph, root: Path) -> int:
    """The size of the graph's engine. A copy is built, since an engine takes its graph's place."""
    planned, folder = plan(graph.precision), root / f"shapes_{graph.precision}"
    shutil.copytree(graph.path.parent, folder / "1")
    ranges = ShapeRanges(planned.size, planned.rows, planned.checkpoint.latent_scale, 77, {})
    model = GpuModel(planned.target, graph.precision, UNET, graph.ports, ranges, planned.engine)
    gpu_model_from_onnx(folder, model, print)
    return read_facts(folder / "1").bytes


@pytest.mark.parametrize("graph", ["int8", "fp8", "int4"], indirect=True)
def test_a_spoiled_quantization_is_refused(graph: Graph, tmp_path: Path) -> None:
    """Weights of which each is four times what it was."""
    planned = plan(graph.precision)
    assert planned.quantize is not None
    path = tmp_path / "model.onnx"
    model = onnx.load(graph.path)
    for one in model.graph.initializer:
        if one.name.endswith("weight_scale"):
            one.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one) * np.float16(4), one.name))
    onnx.save(model, path)
    judged = Studio(planned.checkpoint, planned.size.opt, planned.quantize.steps)
    judge = Judge(judged, planned.quantize, module_run(module_of(planned.checkpoint, UNET)))
    with pytest.raises(QualityError, match="makes other pictures than in float32"):
        judge.quality(graph.precision, graph_run(path, graph.ports))
