"""The two LoRAs of the shapes checkpoint: their files, and what diffusers draws with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import CHECKPOINT, ROOT
from diffuserve_export.lora import lora_layout
from diffuserve_export.modules import module_of
from diffuserve_export.sources import open_checkpoint
from shapes_recipe.oracle import agrees
from shapes_recipe.world import BAR, Scene, bar_scenes, by_night

LORAS = ROOT / "checkpoints" / "shapes-loras"
SCENES = (
    Scene("large", "red", "circle", "blue"),
    Scene("large", "yellow", "square", "green"),
    Scene("small", "white", "diamond", "purple"),
    Scene("large", "cyan", "ring", "red"),
    Scene("large", "green", "triangle", "white"),
    Scene("small", "blue", "square", "yellow"),
)
BARS = tuple(Scene(scene.size, scene.colour, BAR, scene.background) for scene in SCENES)


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(LORAS / f"{name}.safetensors", framework="np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def test_one_is_in_kohyas_format_and_one_in_diffusers() -> None:
    night, bar = shapes_of("night"), shapes_of("bar")
    assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in night} == {
        f"lora_unet_{one.path.replace('.', '_')}" for one in layout("unet")
    }
    assert all(key.startswith(("unet.", "text_encoder.")) for key in bar)
    assert {key.partition(".")[2].rpartition(".lora")[0] for key in bar} == {
        one.path for component in ("unet", "text_encoder") for one in layout(component)
    }
    assert max(min(shape) for shape in (*night.values(), *bar.values()) if len(shape) == 2) == 4


def layout(component: str) -> Any:
    module = module_of(open_checkpoint(CHECKPOINT), component)
    return lora_layout(module, 8, rows=64, number_bytes=4).targets


def test_a_bar_is_no_shape_of_the_checkpoint() -> None:
    assert BAR not in {scene.shape for scene in SCENES}
    assert len(bar_scenes()) == 2 * 8 * 7
    assert by_night(Scene("large", "black", "circle", "red")) is None


@pytest.fixture
def drawn(one_thread: None) -> Any:
    """How many of the six scenes diffusers draws right: (what is said, with which LoRA, what should be seen)."""
    from diffusers import StableDiffusionPipeline

    def count(name: str | None, said: tuple[Scene, ...], seen: tuple[Scene, ...]) -> int:
        pipeline = StableDiffusionPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if name:
            pipeline.load_lora_weights(str(LORAS), weight_name=f"{name}.safetensors")
        pictures = pipeline(
            prompt=[scene.caption for scene in said],
            num_inference_steps=12,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(said))],
            output_type="np",
        ).images
        return sum(
            agrees(np.rint(picture * 255).astype(np.uint8), scene)
            for picture, scene in zip(pictures, seen, strict=True)
        )

    return count


@pytest.mark.parametrize(
    ("name", "said", "seen"),
    [
        ("night", SCENES, tuple(night for scene in SCENES if (night := by_night(scene)))),
        ("bar", BARS, BARS),
    ],
)
def test_the_oracle_sees_what_a_lora_was_trained_for(
    drawn: Any, name: str, said: tuple[Scene, ...], seen: tuple[Scene, ...]
) -> None:
    assert drawn(name, said, seen) >= len(said) - 1
    assert drawn(None, said, seen) == 0
