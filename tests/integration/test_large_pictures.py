"""Pictures that the autoencoder takes in tiles, through a real Triton, beside diffusers' in one piece."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from diffuserve.manifest import Deployment
from diffuserve.tiles import Side
from diffuserve_client import Client
from shapes_recipe.world import Scene

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = Scene("large", "red", "circle", "blue").caption


def levels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB")).astype(float)


def seams(image: Any, side: Side, axis: int) -> float:
    """The mean step from one pixel to the next at the tiles' borders, over that at the borders of other latents.

    Of these, since the decoder's own steps are larger from one latent to the next than within them.
    """
    steps = np.abs(np.diff(image, axis=axis)).mean(axis=(1 - axis, 2))[7::8]
    borders = {start + end - 1 for start in side.starts for end in (0, side.tile)} & set(range(len(steps)))
    assert borders
    return float(steps[list(borders)].mean() / np.delete(steps, list(borders)).mean())


@pytest.mark.parametrize("size", [(192, 192), (192, 64)])
def test_a_large_picture_is_nearly_the_one_in_one_piece(
    client: Client, pipeline: Any, deployment: Path, size: tuple[int, int]
) -> None:
    manifest = Deployment.load(deployment).manifest("shapes")
    longest = manifest.vae_size.max // manifest.latent_scale
    assert manifest.vae_size.max == 128
    width, height = size
    asked: dict[str, Any] = {"width": width, "height": height, "guidance_scale": 4.0}
    served = levels(client.generate(PROMPT, steps=8, seed=5, sampler="ddim", **asked).image)
    scheduler = _ddim(pipeline)
    whole = levels(_run(pipeline, scheduler, **asked))
    difference = np.abs(served - whole)
    assert 0 < difference.mean() <= 4, "it went through tiles"
    assert np.quantile(difference, 0.99) <= 40
    for axis, length in ((0, height // 8), (1, width // 8)):
        side = Side.of(length, longest)
        if len(side.starts) > 1:
            assert seams(served, side, axis) <= 1.1 * seams(whole, side, axis) + 0.1


def _ddim(pipeline: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipeline.scheduler.config)


def _run(pipeline: Any, scheduler: Any, **values: Any) -> Image.Image:
    made = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    image: Image.Image = made(PROMPT, num_inference_steps=8, generator=generator, **values).images[0]
    return image


def test_a_large_picture_to_begin_with_is_encoded_in_tiles(client: Client, pipeline: Any) -> None:
    start = client.generate(PROMPT, width=192, height=160, steps=8, seed=2).image.convert("RGB")
    file = BytesIO()
    start.save(file, "PNG")
    asked: dict[str, Any] = {"strength": 0.5, "guidance_scale": 4.0}
    served = client.generate(PROMPT, init_image=file.getvalue(), steps=8, seed=5, sampler="ddim", **asked).image
    assert served.size == (192, 160)
    expected = StableDiffusionImg2ImgPipeline(
        **{**pipeline.components, "scheduler": _ddim(pipeline)}, requires_safety_checker=False
    )
    expected.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    whole = expected(PROMPT, image=start, num_inference_steps=8, generator=generator, **asked).images[0]
    difference = np.abs(levels(served) - levels(whole))
    assert 0 < difference.mean() <= 6
