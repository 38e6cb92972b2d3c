"""The GPU check's arithmetic and report, with functions in place of engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from diffuserve.manifest import Component, Deployment, TensorShape
from diffuserve.profiles import EngineFacts, Profile, Range
from diffuserve.spec import UNET
from diffuserve_export import VerificationError
from diffuserve_export.gpu_check import compare, example, latencies, report_text
from unit.fakes import write_deployment

INPUTS = (
    TensorShape("sample", "FP16", ("rows", 4, "latent_height", "latent_width")),
    TensorShape("timestep", "FP32", ("rows",)),
    TensorShape("input_ids", "INT32", ("rows", 77)),
)
SIDES = {"latent_height": Range(4, 8, 8), "latent_width": Range(4, 8, 8)}
FACTS = EngineFacts(
    builder="tensorrt-rtx",
    version="1.7.1",
    precision="fp16",
    devices=("8.9",),
    profiles=(
        Profile({name: Range(8, 8, 8) for name in SIDES} | {"rows": Range(2, 2, 2)}),
        Profile({"rows": Range(1, 4, 8), **SIDES}, 3_000_000),
    ),
    onnx_sha256="",
    sha256="",
    bytes=5_000_000,
)
COMPONENT = Component("x_unet", INPUTS, (TensorShape("model_output", "FP16", ("rows",)),), "", 0, engine=FACTS)


def double(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"model_output": inputs["sample"] * 2}


def test_examples_have_the_engines_types_and_the_profiles_sides() -> None:
    drawn = example(INPUTS, FACTS.profiles[1], 3, size="min")
    assert {name: (tuple(one.shape), one.dtype) for name, one in drawn.items()} == {
        "sample": ((3, 4, 4, 4), torch.float16),
        "timestep": ((3,), torch.float32),
        "input_ids": ((3, 77), torch.int32),
    }
    layers = example((TensorShape("clip_skip", "INT32", ("rows",)),), FACTS.profiles[1], 8, size="min")["clip_skip"]
    assert set(layers.tolist()) == {0, 1}, "any encoder has one layer to leave out"
    assert torch.equal(drawn["sample"], example(INPUTS, FACTS.profiles[1], 3, size="min")["sample"])


def test_the_error_is_relative_to_the_references_largest_value() -> None:
    same = compare("unet", COMPONENT, double, double)
    assert [(one.component, one.output, one.rows) for one in same] == [
        ("unet", "model_output", 1),
        ("unet", "model_output", 3),
    ]
    assert all(one.error < 1e-3 for one in same)
    off = compare("unet", COMPONENT, double, lambda inputs: {"model_output": inputs["sample"] * 3})
    assert [round(one.error, 2) for one in off] == [0.5, 0.5]
    with pytest.raises(VerificationError, match=r"model_output has shape \(0, 4, 4, 4\)"):
        compare("unet", COMPONENT, double, lambda inputs: {"model_output": inputs["sample"][:0]})


def test_latency_is_measured_for_each_row_bucket() -> None:
    calls: list[int] = []

    def count(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(len(inputs["timestep"]))
        return {}

    measured = latencies(COMPONENT, count)
    assert list(measured) == [1, 2, 4, 6, 8]
    assert all(seconds >= 0 for seconds in measured.values())
    assert calls == [rows for rows in measured for _ in range(23)]


def test_a_component_without_an_engine_is_refused() -> None:
    with pytest.raises(VerificationError, match="x_unet has no engine"):
        latencies(dataclasses.replace(COMPONENT, engine=None), double)


def test_the_report_has_all_three_tables(tmp_path: Path) -> None:
    deployment = write_deployment(tmp_path, "x")
    manifest = deployment.manifest("x")
    changed = dataclasses.replace(manifest, components={**manifest.components, UNET: COMPONENT})
    (Deployment.load(tmp_path).folder("x") / "manifest.json").write_text(changed.to_json())
    text = report_text(tmp_path, ["ok: GPU: a card"], compare("unet", COMPONENT, double, double)[:1], {2: 0.004})
    assert "- ok: GPU: a card" in text
    assert "| unet | 1.7.1 | 8.9 | 5 | 0, 3 | 0 |" in text
    assert "| unet | model_output | 1 | " in text
    assert "| 2 | 4.00 | 2.00 |" in text
