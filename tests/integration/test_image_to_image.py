"""Requests that begin with a picture, against diffusers' own image-to-image pipeline."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffuserve_client import Client, GenerateRequest, InvalidArgumentError
from unit.pictures import SVG, encoded, png_of_size

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a small green ring on a white background"
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
STRENGTHS = (0.3, 0.7, 1.0)


@pytest.fixture(scope="module")
def start(client: Client) -> Image.Image:
    image: Image.Image = client.generate("a large red circle on a blue background", seed=1).image
    return image.convert("RGB")


def test_it_is_diffusers_picture(client: Client, pipeline: Any, start: Image.Image) -> None:
    cases = list(itertools.product(SCHEDULERS, STRENGTHS))

    def ours(case: tuple[str, float]) -> list[Any]:
        sampler, strength = case
        result = client.generate(
            PROMPT,
            init_image=encoded(start),
            strength=strength,
            sampler=sampler,
            steps=10,
            guidance_scale=5.0,
            seed=3,
            num_images=2,
        )
        return [np.asarray(image.image).astype(int) for image in result.images]

    with ThreadPoolExecutor(len(cases)) as pool:
        served = dict(zip(cases, pool.map(ours, cases), strict=True))
    for sampler, strength in cases:
        scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config)
        expected = diffusers.StableDiffusionImg2ImgPipeline(
            **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        expected.set_progress_bar_config(disable=True)
        images = expected(
            [PROMPT] * 2,
            image=[start] * 2,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        ).images
        for mine, theirs in zip(served[sampler, strength], images, strict=True):
            difference = np.abs(mine - np.asarray(theirs).astype(int)).max()
            assert difference <= 2, (sampler, strength)


def test_size_steps_and_formats(client: Client, start: Image.Image) -> None:
    larger = start.resize((100, 70))
    events = list(
        client.stream(
            GenerateRequest(
                prompt=PROMPT,
                init_image=encoded(larger, "JPEG"),
                strength=0.5,
                steps=8,
                sampler="ddim",
                progress_every=1,
            )
        )
    )
    assert [(event.step, event.steps) for event in events if event.kind == "progress"] == [(1, 4), (2, 4), (3, 4)]
    info = events[-1].info
    assert (info["width"], info["height"], info["strength"], info["steps"]) == (96, 64, 0.5, 8)
    asked = client.generate(PROMPT, init_image=encoded(larger, "WEBP"), strength=0.5, steps=4, width=64, height=96)
    assert asked.image.size == (64, 96)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"init_image": png_of_size(30_000, 30_000)}, "has more pixels than the 16777216 in all that are taken"),
        ({"init_image": png_of_size(5_000, 5_000)}, "has 5000 x 5000 pixels, and at most 16777216"),
        ({"init_image": png_of_size(64, 64)}, "cannot be decoded .* send the whole file"),
        ({"init_image": b"\x89PNG\r\n\x1a\n"}, "is no picture in PNG, JPEG, WEBP"),
        ({"init_image": SVG}, "is no picture in PNG, JPEG, WEBP"),
        ({"init_image": b"\0" * (33 << 20)}, r"has 34603008 bytes, and at most 33554432"),
        ({"strength": 0.5}, "strength is given without init_image"),
        ({"init_image": png_of_size(64, 64), "strength": 0.0}, "strength is 0, which would leave"),
        ({"init_image": png_of_size(64, 64), "strength": 1.5}, "strength is 1.5, and must be from 0 to 1"),
    ],
)
def test_bad_pictures_are_refused_and_nothing_else_is_disturbed(
    client: Client, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        client.generate(PROMPT, steps=4, **values)
    assert client.generate(PROMPT, steps=1).images
