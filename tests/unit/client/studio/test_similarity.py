"""MSE, PSNR and SSIM against their formulas."""

from __future__ import annotations

import json
import math

import numpy as np
import PIL.Image
import pytest

from diffuserve_client._studio.similarity import IncomparableError, Similarity, similarity_of
from unit.client.studio.wang import ssim_of_wang

RANDOM = np.random.default_rng(0)


def noisy(sigma: float, size: tuple[int, int] = (40, 33)) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    first = ramp + RANDOM.normal(0, 5, ramp.shape)
    pair = (first, first + RANDOM.normal(0, sigma, ramp.shape))
    return tuple(PIL.Image.fromarray(np.clip(one, 0, 255).astype(np.uint8)) for one in pair)  # type: ignore[return-value]


@pytest.mark.parametrize("sigma", [0.5, 8, 90])
def test_the_numbers_are_the_formulas(sigma: float) -> None:
    first, second = noisy(sigma)
    found = similarity_of(second, first)
    a, b = (np.asarray(one, np.float64) for one in (first, second))
    mse = float(((a - b) ** 2).mean())
    assert found.mse == pytest.approx(mse)
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 / mse))
    assert found.ssim == pytest.approx(ssim_of_wang(a, b), abs=1e-6)
    assert similarity_of(first, second) == found


def test_identical_pictures_are_infinite_and_still_json() -> None:
    picture, _ = noisy(1)
    found = similarity_of(picture, picture.copy())
    assert found == Similarity(mse=0.0, psnr_db=math.inf, ssim=1.0)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told == {"mse": 0.0, "psnr_db": "Infinity", "ssim": 1.0}
    assert float(told["psnr_db"]) == found.psnr_db
    assert found.as_text() == "identical"


def test_transparency_and_palettes_are_read_as_they_look() -> None:
    picture, other = noisy(20)
    assert similarity_of(picture.convert("RGBA"), other) == similarity_of(picture, other)


def test_other_sizes_and_pictures_below_the_window_are_not_measured() -> None:
    first, _ = noisy(1)
    with pytest.raises(IncomparableError, match="40x32 is not the baseline's size, 40x33"):
        similarity_of(first.crop((0, 0, 40, 32)), first)
    small = first.crop((0, 0, 40, 10))
    with pytest.raises(IncomparableError, match="40x10 is below SSIM's window of 11x11"):
        similarity_of(small, small)
