"""From a UNet in float32 to a verdict on its quantized graph's pictures, on small random checkpoints."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffuserve.spec import UNET
from diffuserve_export import ExportError, ExportOptions, OptionError, QualityError, Report
from diffuserve_export.engines import EngineOptions
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.modules import module_of
from diffuserve_export.quantize import QuantizeOptions, options, plan_quantization
from diffuserve_export.quantize.layers import QuantizedConv2d, QuantizedLinear
from diffuserve_export.quantize.pictures import Studio
from diffuserve_export.quantize.quality import check_quality, psnr
from diffuserve_export.quantize.unet import Judge, QuantizedUNet, module_run, quantized_unet
from diffuserve_export.sources import open_checkpoint
from unit.export.pipelines import PIPELINES, random_pipeline

PROMPTS = ("a red circle", "two blue cats", "a house", "snow on a hill")
SIZE = 16
STEPS = 3


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    for kind in PIPELINES:
        random_pipeline(kind).save_pretrained(root / kind, safe_serialization=True)
    return root


def plan(folder: Path, **changed: Any) -> Plan:
    engine = EngineOptions(compute_capability="89")
    values: dict[str, Any] = {"target": "tensorrt-rtx", "precision": "int8", "engine": engine, **changed}
    return plan_export(ExportOptions(checkpoint=str(folder), out=Path("unused"), **values))


@pytest.mark.parametrize("kind", sorted(PIPELINES.keys() - {"sd15-inpaint"}))
def test_pictures_are_those_of_diffusers(kinds: Path, kind: str) -> None:
    checkpoint = open_checkpoint(kinds / kind)
    pictures = Studio(checkpoint, SIZE, STEPS).pictures(module_run(module_of(checkpoint, UNET)), PROMPTS[:2], [7, 8])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(kinds / kind, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=list(PROMPTS[:2]),
        guidance_scale=checkpoint.guidance_scale,
        num_inference_steps=STEPS,
        width=SIZE,
        height=SIZE,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="pt",
    ).images
    assert torch.allclose(pictures, expected, atol=1e-5)


def test_a_picture_to_paint_in_is_made_up(kinds: Path) -> None:
    checkpoint = open_checkpoint(kinds / "sd15-inpaint")
    studio, seen = Studio(checkpoint, SIZE, STEPS), list[Tensor]()

    def run(inputs: Sequence[Tensor]) -> Tensor:
        seen.append(inputs[0])
        return torch.zeros_like(inputs[0][:, :4])

    assert studio.pictures(run, PROMPTS[:1], [7]).shape == (1, 3, SIZE, SIZE)
    mask, masked = seen[0][:, 4], seen[0][:, 5:]
    assert set(mask.flatten().tolist()) == {0, 1}
    assert masked.std() > 0


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def quantized(request: pytest.FixtureRequest, kinds: Path) -> QuantizedUNet:
    planned = plan(kinds / request.param, quantize=QuantizeOptions(steps=STEPS, pictures=2))
    return quantized_unet(planned, module_of(planned.checkpoint, UNET), (), Report())


def test_a_quantized_unet_is_close_and_says_what_it_is(quantized: QuantizedUNet) -> None:
    facts, names = quantized.verdict.facts, dict(quantized.module.named_modules())
    assert facts.layers.keys() == {"int8"}
    assert all(isinstance(names[name], (QuantizedLinear, QuantizedConv2d)) for name in facts.layers["int8"])
    rest = [name for ones in facts.left.values() for name in ones]
    assert all(type(names[name]) in (nn.Linear, nn.Conv2d) for name in rest)
    assert {"carries a block's input past it", "the last layer"} <= facts.left.keys()
    assert ("embeds the size of the picture" in facts.left) == any("add_embedding" in name for name in names)
    assert (facts.prompts, facts.calibrated, facts.steps, facts.gate) == ("built-in", 24, STEPS, QuantizeOptions().gate)
    quality = quantized.verdict.judge.quality("int8", module_run(quantized.module))
    assert quality is not None
    assert quality.psnr > 30


def test_a_spoiled_quantization_is_refused(quantized: QuantizedUNet) -> None:
    module = copy.deepcopy(quantized.module)
    for layer in module.modules():
        if isinstance(layer, (QuantizedLinear, QuantizedConv2d)):
            layer.weight_scale *= 8
    with pytest.raises(QualityError, match="the UNet in int8 makes other pictures than in float32"):
        quantized.verdict.judge.quality("int8", module_run(module))


def test_a_unet_that_needs_float32_is_not_quantized(kinds: Path) -> None:
    planned = plan(kinds / "sd15")
    with pytest.raises(ExportError, match=r"unet has no layer that can be int8 \(.*needs float32.*export it in fp16"):
        quantized_unet(planned, module_of(planned.checkpoint, UNET), [""], Report())


def test_spoiled_pictures_are_refused(kinds: Path) -> None:
    planned = plan(kinds / "sd15", quantize=QuantizeOptions(steps=STEPS, pictures=2, gate=60))
    assert planned.quantize is not None
    run = module_run(module_of(planned.checkpoint, UNET))
    judge = Judge(Studio(planned.checkpoint, SIZE, STEPS), planned.quantize, run)
    quality = judge.quality("int8", run)
    assert quality is not None
    assert (quality.pictures, quality.psnr) == (2, 100.0)
    with pytest.raises(QualityError, match=r"int8.* PSNR is .* dB over 2 of them, and the quality gate is 60 dB; cali"):
        judge.quality("int8", lambda inputs: run(inputs) * 3)
    with pytest.raises(QualityError, match="PSNR is not a number"):
        judge.quality("int8", lambda inputs: run(inputs) * float("nan"))


def test_no_pictures_no_verdict(kinds: Path) -> None:
    planned = plan(kinds / "sd15", quantize=QuantizeOptions(pictures=0))
    assert planned.quantize is not None
    judge = Judge(Studio(planned.checkpoint, SIZE, STEPS), planned.quantize, lambda _: pytest.fail("it was drawn"))
    assert judge.quality("int8", lambda _: pytest.fail("it was drawn")) is None


def test_psnr_is_in_decibels() -> None:
    black = torch.zeros(3, 3, 4, 4)
    found = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert psnr(found, black).tolist() == pytest.approx([20, 100, 0])
    assert check_quality("fp8", found, black, 40).lowest == 0


def test_the_rest_is_in_half_precision(kinds: Path) -> None:
    precisions = plan(kinds / "sdxl", precision="fp8").precisions
    assert precisions == {
        "text_encoder": "fp16",
        "text_encoder_2": "fp16",
        "unet": "fp8",
        "vae_decoder": "fp32",
        "vae_encoder": "fp32",
    }


def test_prompts_are_the_users_or_the_checkpoints(kinds: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shutil.copytree(kinds / "sd15", tmp_path / "own"))
    built_in = plan_quantization(checkpoint, QuantizeOptions())
    assert (built_in.source, len(built_in.calibration), len(built_in.judged), built_in.steps) == ("built-in", 24, 8, 20)
    (tmp_path / "own" / "calibration.txt").write_text("\n".join(PROMPTS))
    own = plan_quantization(checkpoint, QuantizeOptions())
    assert (own.source, own.calibration, own.judged) == ("calibration.txt", PROMPTS[:3], PROMPTS[3:])
    given = tmp_path / "given.txt"
    given.write_text("one\n\n  two  \n")
    theirs = plan_quantization(checkpoint, QuantizeOptions(calibration=given, steps=5))
    assert (theirs.source, theirs.calibration, theirs.judged, theirs.steps) == (str(given), ("one",), ("two",), 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"one\n", "has 1 prompts, and needs 2"), (b"\xff\n", "cannot be read .*give a UTF-8 text file")],
)
def test_prompts_that_are_none(kinds: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "given.txt").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        plan_quantization(open_checkpoint(kinds / "sd15"), QuantizeOptions(calibration=tmp_path / "given.txt"))


def test_modelopt_may_be_missing(kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_PACKAGE", "no-such-package")
    with pytest.raises(ExportError, match=r"no-such-package; pip install 'diffuserve\[quantize\]'"):
        plan(kinds / "sd15")


def test_what_decides_a_quantization_enters_the_key(kinds: Path) -> None:
    first = plan(kinds / "sd15")
    assert first.quantize is not None
    assert plan(kinds / "sd15", precision="fp16").quantize is None
    for changed in ({"steps": 5}, {"judged": ("x",)}, {"calibration": ("x",)}, {"gate": 1.0}, {"version": "0"}):
        assert replace(first, quantize=replace(first.quantize, **changed)).facts() != first.facts()
