"""Adapters beside quantized layers, and engines of the shapes checkpoint with adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import CHECKPOINT
from diffuserve.spec import UNET
from diffuserve_export import ExportOptions, export_checkpoint
from diffuserve_export.engines import EngineOptions
from diffuserve_export.export import plan_export
from diffuserve_export.graphs import graph_from_component
from diffuserve_export.verify import TOLERANCE
from unit.export.conftest import Recorder, without_logs
from unit.export.pipelines import random_pipeline

RTX: dict[str, Any] = {"target": "tensorrt-rtx", "engine": EngineOptions(compute_capability="89")}


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_quantized_layers_keep_adapters_beside_them(precision: str, tmp_path: Path) -> None:
    random_pipeline().save_pretrained(tmp_path / "small")
    options = ExportOptions(
        checkpoint=str(tmp_path / "small"), out=tmp_path / "out", precision=precision, lora_rank=3, **RTX
    )
    plan = plan_export(options)
    assert plan.quantize is not None
    few = replace(plan.quantize, calibration=plan.quantize.calibration[:2], steps=2, pictures=1, gate=1.0)
    path, report = tmp_path / "unet" / "1" / "model.onnx", Recorder()
    path.parent.mkdir(parents=True)
    with without_logs():
        graph = graph_from_component(replace(plan, quantize=few), UNET, path, report)
    assert graph.quantization is not None
    assert graph.quantization.pictures == 1
    assert graph.lora is not None
    assert {one.path for one in graph.lora.targets} & {
        name.removeprefix("model.") for names in graph.quantization.layers.values() for name in names
    }
    assert all(one.error < TOLERANCE[precision] for one in report.results)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_shapes_checkpoint_is_built_with_adapters(precision: str, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=str(CHECKPOINT), out=tmp_path / "out", precision=precision, lora_rank=8, **RTX)
    with without_logs():
        manifest = export_checkpoint(options)
    for name in ("text_encoder", UNET):
        component = manifest.components[name]
        assert component.engine is not None
        assert component.lora is not None
        assert all(one.takes({"adapters": 1}) for one in component.engine.profiles)
        assert all(one.takes({"adapters": component.lora.adapters}) for one in component.engine.profiles)
