"""UNets of every kind in fp16 and bf16: one type for all but times, and what torch computes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from unit.export.conftest import Recorder
from unit.export.pipelines import PIPELINES
from unit.export.test_precision import export, small_plan, types_of

TIMES = ("timestep", "time_ids")
#: The type, and the largest error beside a float32 copy of the graph's weights.
PRECISIONS = {"fp16": (TensorProto.FLOAT16, 1e-2), "bf16": (TensorProto.BFLOAT16, 1e-4)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_unet_takes_one_type_but_for_times(kind: str, precision: str, tmp_path: Path) -> None:
    report = Recorder()
    graph = export(small_plan(tmp_path, kind, precision), "unet", tmp_path / "graph", report)
    half, most = PRECISIONS[precision]
    types = types_of(graph.path)
    assert types == {name: TensorProto.FLOAT if name in TIMES else half for name in types}
    weights = [one.data_type for one in onnx.load(graph.path).graph.initializer if len(one.raw_data) > 1000]
    assert set(weights) == {half}
    assert len(report.results) == 2
    assert all(one.error < most for one in report.results)
