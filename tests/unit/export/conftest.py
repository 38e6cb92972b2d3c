"""A random SD1.x checkpoint, as small as the architecture allows, and one export of it that the tests share."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffuserve.manifest import Manifest
from diffuserve_export import ExportOptions, Report, assembly, export_checkpoint
from diffuserve_export.verify import Verified

TOKENIZER = Path(__file__).parents[3] / "checkpoints" / "shapes" / "tokenizer"


def random_pipeline() -> StableDiffusionPipeline:
    """Factor 2 from pixels to latents, two UNet levels, 8 latents a side: 16 pixels, in steps of 4."""
    torch.manual_seed(5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.3,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
    # pytest listens to every logger, and torch's tracer writes down each guess about a shape where somebody listens.
    logging.disable(logging.WARNING)
    try:
        manifest = export_checkpoint(ExportOptions(checkpoint=str(saved_checkpoint), out=out), report)
    finally:
        logging.disable(logging.NOTSET)
    return Exported(saved_checkpoint, out, manifest, report)


@pytest.fixture
def checkpoint(saved_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved_checkpoint, tmp_path / "tiny")


@pytest.fixture
def graphs_from_store(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports copy the shared graphs instead of tracing again, and verify nothing."""

    def copy(module: Any, ports: Any, example: Any, path: Path, opset: int) -> Path:
        component = path.parents[1].name.split("_", 1)[1]
        return Path(shutil.copyfile(exported.graph(component), path))

    def nothing(*_: Any) -> Sequence[Any]:
        return []

    monkeypatch.setattr(assembly, "onnx_from_component", copy)
    monkeypatch.setattr(assembly, "module_of", nothing)
    monkeypatch.setattr(assembly, "verify_onnx", nothing)
