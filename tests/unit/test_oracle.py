"""The oracle accepts what is right, however noisy, and refuses what is wrong in a single attribute."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shapes_recipe.oracle import agrees, judge
from shapes_recipe.world import COLOURS, RADII, SHAPES, SIZES, Scene, all_scenes, coverage, render

Picture = npt.NDArray[np.uint8]
Drawing = npt.NDArray[np.float32]

FRAMES = [(64, 64), (96, 96), (64, 96), (96, 64)]


def some_scenes(count: int, seed: int) -> list[Scene]:
    scenes = all_scenes()
    return [scenes[int(index)] for index in np.random.default_rng(seed).permutation(len(scenes))[:count]]


def as_picture(drawing: Drawing) -> Picture:
    """A drawing of 0 to 1 as bytes."""
    picture: Picture = np.rint(np.clip(drawing, 0, 1) * 255).astype(np.uint8)
    return picture


def blurred(drawing: Drawing) -> Drawing:
    """Each pixel averaged with its neighbours, by the weights 1 2 1 in both directions."""
    for axis in (0, 1):
        padded = np.pad(drawing, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, at, after = (np.take(padded, range(i, i + drawing.shape[axis]), axis) for i in range(3))
        drawing = (before + 2 * at + after) / 4
    return drawing


def worn(drawing: Drawing, rng: np.random.Generator) -> Picture:
    """What a small model makes of a drawing: soft edges and noise."""
    return as_picture(blurred(drawing) + rng.normal(0, 8 / 255, drawing.shape).astype(np.float32))


def blend(share: Drawing, foreground: npt.NDArray[Any], background: npt.NDArray[Any]) -> Drawing:
    """Any share of shape per pixel, in two colours of 0 to 255."""
    drawing = share[..., None] * foreground + (1 - share[..., None]) * background
    return np.asarray(drawing / 255, np.float32)


def painted(share: Drawing, scene: Scene) -> Drawing:
    return blend(share, np.array(COLOURS[scene.colour]), np.array(COLOURS[scene.background]))


def shares_of(scene: Scene, size: int) -> Drawing:
    return coverage(scene.shape, RADII[scene.size], (0.0, 0.0), size, size)


def variants(scene: Scene) -> list[Scene]:
    """Every scene that differs in one attribute."""
    alternatives = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(COLOURS)}
    changed = [replace(scene, **{name: value}) for name, values in alternatives.items() for value in values]
    return [other for other in changed if other != scene and other.colour != other.background]


@pytest.mark.parametrize(("width", "height"), FRAMES)
def test_accepts_scenes_as_the_training_set_draws_them(width: int, height: int) -> None:
    rng = np.random.default_rng(1)
    for scene in some_scenes(40, seed=width * height):
        verdict = judge(as_picture(render(scene, width, height, rng)))
        assert verdict.matches(scene), (scene.caption, verdict)


@pytest.mark.parametrize(("width", "height"), FRAMES)
def test_accepts_worn_scenes(width: int, height: int) -> None:
    rng = np.random.default_rng(2)
    for scene in some_scenes(40, seed=width + height):
        verdict = judge(worn(render(scene, width, height, rng), rng))
        assert verdict.matches(scene), (scene.caption, verdict)


def test_accepts_every_size_colour_shape_and_background_at_least_once_worn() -> None:
    rng = np.random.default_rng(3)
    scenes = [scene for index, scene in enumerate(all_scenes()) if index % 5 == 0]
    for name, values in {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "background": COLOURS}.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    for scene in scenes:
        assert agrees(worn(render(scene, 64, 64, rng), rng), scene), scene.caption


def test_accepts_colours_that_are_off_by_thirty() -> None:
    rng = np.random.default_rng(4)
    for scene in some_scenes(40, seed=4):
        near = [np.array(COLOURS[name]) + rng.choice([-30, 30], 3) for name in (scene.colour, scene.background)]
        verdict = judge(as_picture(blend(shares_of(scene, 64), *near)))
        assert verdict.matches(scene), (scene.caption, near, verdict)


def test_accepts_a_droplet_of_three_by_three_pixels() -> None:
    for scene in some_scenes(40, seed=5):
        drawing = render(scene, 64, 64)
        drawing[4:7, 5:8] = np.array(COLOURS[scene.colour]) / 255
        assert agrees(as_picture(drawing), scene), scene.caption


def test_refuses_every_scene_that_differs_in_one_attribute() -> None:
    """The picture shows a scene, and no caption but its own may pass; so with the picture of each variant."""
    rng = np.random.default_rng(6)
    for scene in some_scenes(12, seed=6):
        picture = worn(render(scene, 64, 64, rng), rng)
        assert agrees(picture, scene)
        assert not any(map(judge(picture).matches, variants(scene)))
    for scene in some_scenes(6, seed=7):
        for other in variants(scene):
            assert not agrees(worn(render(other, 64, 64, rng), rng), scene), (scene.caption, other.caption)


def blank(scene: Scene, size: int) -> Drawing:
    return painted(np.zeros((size, size), np.float32), scene)


def two_shapes(scene: Scene, size: int) -> Drawing:
    left, right = (coverage(scene.shape, 0.33, (x, y), size, size) for x, y in ((-0.45, -0.4), (0.45, 0.4)))
    return painted(left + right, scene)


def shape_and_satellite(scene: Scene, size: int) -> Drawing:
    """One good shape, and another of an eighth of the side in the corner."""
    drawing = render(scene, size, size)
    near, far = size // 16, size // 16 + size // 8
    drawing[near:far, near:far] = np.array(COLOURS[scene.colour]) / 255
    return drawing


def third_colour(scene: Scene, size: int) -> Drawing:
    drawing = render(scene, size, size)
    third = next(name for name in COLOURS if name not in (scene.colour, scene.background))
    near, far = size // 2, size // 2 + size // 8
    drawing[near:far, near:far] = np.array(COLOURS[third]) / 255
    return drawing


def left_half(scene: Scene, size: int) -> Drawing:
    share = shares_of(scene, size)
    share[:, size // 2 :] = 0
    return painted(share, scene)


def quarter_missing(scene: Scene, size: int) -> Drawing:
    share = shares_of(scene, size)
    share[size // 2 :, size // 2 :] = 0
    return painted(share, scene)


def between_sizes(scene: Scene, size: int) -> Drawing:
    return painted(coverage(scene.shape, 0.48, (0.0, 0.0), size, size), scene)


def split_background(scene: Scene, size: int) -> Drawing:
    drawing = render(scene, size, size)
    third = next(name for name in COLOURS if name not in (scene.colour, scene.background))
    drawing[: size // 8] = np.array(COLOURS[third]) / 255
    return drawing


def off_palette(scene: Scene, size: int) -> Drawing:
    return blend(shares_of(scene, size), np.array((128, 128, 128)), np.array(COLOURS[scene.background]))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (blank, "no shape"),
        (two_shapes, "no shape fits: best IoU"),
        (shape_and_satellite, "no shape fits|more or less than one|between two shapes"),
        (third_colour, "not two colours"),
        (left_half, "no shape fits: best IoU|no shape$|not two colours"),
        (quarter_missing, "no shape fits: best IoU"),
        (between_sizes, "size between the two"),
        (split_background, "background not uniform"),
        (off_palette, "shape of no known colour"),
    ],
)
def test_refuses_pictures_of_no_scene(wrong: Callable[[Scene, int], Drawing], reason: str, size: int) -> None:
    rng = np.random.default_rng(8)
    for scene in some_scenes(12, seed=8):
        verdict = judge(worn(wrong(scene, size), rng))
        assert verdict.seen is None, (scene.caption, verdict)
        assert re.match(reason, verdict.reason), (scene.caption, verdict)


def test_refuses_noise() -> None:
    rng = np.random.default_rng(9)
    for _ in range(10):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert judge(noise).seen is None
        smooth = (noise / 255).astype(np.float32)
        for _ in range(8):
            smooth = blurred(smooth)
        stretched = (smooth - smooth.min()) / (smooth.max() - smooth.min())
        assert judge(as_picture(stretched)).seen is None


def test_refuses_a_noisy_shape() -> None:
    """Noise of sigma 60 over a good scene: an unfinished denoising must not pass."""
    rng = np.random.default_rng(10)
    for scene in some_scenes(20, seed=10):
        drawing = render(scene, 64, 64) + rng.normal(0, 60 / 255, (64, 64, 3)).astype(np.float32)
        assert judge(as_picture(drawing)).seen is None, scene.caption


def test_a_pil_image_is_judged_as_its_array() -> None:
    for scene in some_scenes(5, seed=11):
        picture = as_picture(render(scene, 64, 96))
        assert judge(Image.fromarray(picture)) == judge(picture)
        assert agrees(Image.fromarray(picture), scene)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"uint8 \[height, width, 3\], not uint8 \[64, 64\]"),
        (np.zeros((64, 64, 3), np.float32), r"not float32 \[64, 64, 3\]"),
        (np.zeros((64, 31, 3), np.uint8), "31x64 is below 32"),
    ],
)
def test_what_is_no_picture_is_an_error(picture: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(picture)
