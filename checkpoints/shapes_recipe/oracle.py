"""The judge of the shapes world: which scene a picture shows, from its pixels alone.

A picture of this world is a blend of two colours, so it is read in three steps: name the background and the
shape's colour, turn every pixel into the share of the shape that covers it, and fit each shape to those shares.
Edges may be soft, colours a little off and the shape anywhere; a third colour, a second shape or a shape that fits
none of the six is refused, with the reason. Other shapes that a LoRA knows are judged where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shapes_recipe.world import BAR, COLOURS, RADII, SHAPES, Scene, coverage

__all__ = ["Verdict", "agrees", "judge"]

Array = npt.NDArray[np.float32]

SMALLEST_SIDE: Final = 32

# Distances between colours are Euclidean, in RGB of 0 to 255. The two nearest colours of the palette, blue and
# purple, are 118 apart: a measured colour within half of that has one name only.
COLOUR_TOLERANCE: Final = 58.0
# Noise of sigma 8 takes one pixel in a hundred thousand this far off the line between two colours. A third colour is
# further from any such line: purple is 41 from red to blue, and all others are at least 75.
BLEND_TOLERANCE: Final = 38.0
# A patch of 6 x 6 pixels in 64 x 64 is 0.9 %; the odd droplet of an autoencoder is less.
STRAY_SHARE: Final = 0.008
BORDER_STRAY_SHARE: Final = 0.05
BORDER: Final = 2
# The smallest shape, a small ring, covers 4.7 % of a 64 x 96 picture: its own pixels lie above this percentile.
SHAPE_PERCENTILE: Final = 97.0

RADIUS_TOLERANCE: Final = 0.15
# Over all scenes at 64 x 64 with noise of sigma 8, blurred twice by 1 2 1, true fits reach at least 0.88 and lead by
# 0.08; blurred thrice, 0.84 and 0.06. Half a shape stays below 0.8, unless it is a smaller whole one.
LEAST_OVERLAP: Final = 0.80
LEAST_MARGIN: Final = 0.04
# What the best fit leaves over, as a solid square of this share of the shorter side (5 pixels of 64), is a second
# shape or a missing part, however small beside a large shape.
LEFTOVER_SIDE: Final = 5 / 64
LEFTOVER_SHARE: Final = 0.9
# A first fit as good as this, and as far ahead of the next, needs no search.
CLEAR_OVERLAP: Final = 0.90
CLEAR_MARGIN: Final = 0.10
SEARCH_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """The scene that a picture shows, or None and the reason why it shows none."""

    seen: Scene | None
    reason: str

    def matches(self, scene: Scene) -> bool:
        return self.seen == scene


@dataclass(frozen=True, slots=True)
class _Fit:
    """A shape laid over the picture, and the overlap (soft IoU) that it reaches there."""

    shape: str
    radius: float
    centre: tuple[float, float]
    overlap: float


class _RefusedError(Exception):
    """Not a picture of this world; never leaves this module."""


def agrees(picture: object, scene: Scene) -> bool:
    """Whether the picture shows the scene, in all four attributes."""
    return judge(picture, SHAPES if scene.shape in SHAPES else (*SHAPES, scene.shape)).matches(scene)


def judge(picture: object, shapes: Sequence[str] = SHAPES) -> Verdict:
    """Judge a uint8 [height, width, 3] array, or anything numpy converts to one, such as an RGB PIL image.

    It shows one of `shapes`, or nothing.
    """
    pixels = _pixels(picture)
    try:
        background = _background(pixels)
        foreground = _foreground(pixels, background)
        names = _name(foreground, "shape"), _name(background, "background")
        if names[0] == names[1]:
            raise _RefusedError(f"no shape: it is as {names[0]} as the background")
        shares = _shares(pixels, foreground, background)
        fit = _best_fit(shares, shapes)
        size = _size(fit)
        _refuse_leftover(shares, fit)
    except _RefusedError as refused:
        return Verdict(None, str(refused))
    return Verdict(Scene(size, names[0], fit.shape, names[1]), f"IoU {fit.overlap:.2f}")


def _pixels(picture: object) -> Array:
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        raise ValueError(f"a picture of {pixels.shape[1]}x{pixels.shape[0]} is below {SMALLEST_SIDE} pixels a side")
    return pixels.astype(np.float32)


def _distance(pixels: Array, colour: Array) -> Array:
    return np.linalg.norm(pixels - colour, axis=-1).astype(np.float32)


def _background(pixels: Array) -> Array:
    inside = np.zeros(pixels.shape[:2], np.bool_)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    border = pixels[~inside]
    colour = np.median(border, axis=0).astype(np.float32)
    stray = float((_distance(border, colour) > BLEND_TOLERANCE).mean())
    if stray > BORDER_STRAY_SHARE:
        raise _RefusedError(f"background not uniform: {stray:.0%} of the border has another colour")
    return colour


def _foreground(pixels: Array, background: Array) -> Array:
    distance = _distance(pixels, background)
    far = float(np.percentile(distance, SHAPE_PERCENTILE))
    if far < COLOUR_TOLERANCE:
        raise _RefusedError("no shape")
    return np.median(pixels[distance > 0.7 * far], axis=0).astype(np.float32)


def _name(colour: Array, part: str) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] > COLOUR_TOLERANCE:
        rgb = tuple(int(channel) for channel in colour)
        raise _RefusedError(f"{part} of no known colour: {rgb} is {distances[nearest]:.0f} away from {nearest}")
    return nearest


def _shares(pixels: Array, foreground: Array, background: Array) -> Array:
    """How much of the shape each pixel holds: its place on the line from the background's colour to the shape's."""
    line = foreground - background
    shares = np.clip((pixels - background) @ line / float(line @ line), 0, 1)
    stray = float((_distance(pixels, background + shares[..., None] * line) > BLEND_TOLERANCE).mean())
    if stray > STRAY_SHARE:
        raise _RefusedError(f"not two colours: {stray:.1%} of the pixels are no blend of shape and background")
    return _sharpened(shares.astype(np.float32))


def _sharpened(shares: Array) -> Array:
    """Noise on flat areas and the width of soft edges say nothing about the shape."""
    return np.clip((shares - 0.25) * 2, 0, 1)


def _best_fit(shares: Array, shapes: Sequence[str]) -> _Fit:
    best, second, *_ = sorted((_fit_by_moments(shares, shape) for shape in shapes), key=lambda fit: -fit.overlap)
    if best.overlap < CLEAR_OVERLAP or best.overlap - second.overlap < CLEAR_MARGIN:
        best, second = sorted((_refined(shares, fit) for fit in (best, second)), key=lambda fit: -fit.overlap)
    if best.overlap < LEAST_OVERLAP:
        raise _RefusedError(f"no shape fits: best IoU {best.overlap:.2f}, {best.shape}")
    if best.overlap - second.overlap < LEAST_MARGIN:
        raise _RefusedError(
            f"between two shapes: {best.shape} IoU {best.overlap:.2f}, {second.shape} {second.overlap:.2f}"
        )
    return best


def _fit_by_moments(shares: Array, shape: str) -> _Fit:
    """The shape at the radius and centre that give it the area and centroid of the shares."""
    height, width = shares.shape
    pixel = 2 / min(width, height)
    area, x, y = _moments(shares, pixel)
    unit_area, unit_x, unit_y = _UNIT_MOMENTS[shape]
    radius = float(np.sqrt(area / unit_area))
    return _laid(shares, shape, radius, (x - radius * unit_x, y - radius * unit_y))


def _moments(shares: Array, pixel: float) -> tuple[float, float, float]:
    """Area and centroid, in the world's coordinates."""
    height, width = shares.shape
    total = float(shares.sum())
    x = float(shares.sum(axis=0) @ (np.arange(width) + 0.5 - width / 2)) / total
    y = float(shares.sum(axis=1) @ (np.arange(height) + 0.5 - height / 2)) / total
    return total * pixel**2, x * pixel, y * pixel


# Each shape's area and centroid at half the radius of the picture, scaled to radius 1.
_UNIT_MOMENTS: Final = {
    shape: tuple(
        moment * factor
        for moment, factor in zip(_moments(coverage(shape, 0.5, (0.0, 0.0), 128, 128), 2 / 128), (4, 2, 2), strict=True)
    )
    for shape in (*SHAPES, BAR)
}


def _template(shape: str, radius: float, centre: tuple[float, float], like: Array) -> Array:
    height, width = like.shape
    return _sharpened(coverage(shape, radius, centre, width, height))


def _laid(shares: Array, shape: str, radius: float, centre: tuple[float, float]) -> _Fit:
    template = _template(shape, radius, centre, shares)
    overlap = float(np.minimum(shares, template).sum() / np.maximum(shares, template).sum())
    return _Fit(shape, radius, centre, overlap)


def _refined(shares: Array, fit: _Fit) -> _Fit:
    """Climb from a fit in steps of one pixel, then less, of radius and centre."""
    pixel = 2 / min(shares.shape)
    for step in (pixel / 2**n for n in range(SEARCH_ROUNDS)):
        for by_x, by_y, by_radius in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            centre = fit.centre[0] + by_x * step, fit.centre[1] + by_y * step
            other = _laid(shares, fit.shape, fit.radius + by_radius * step, centre)
            fit = max(fit, other, key=lambda one: one.overlap)
    return fit


def _size(fit: _Fit) -> str:
    size = min(RADII, key=lambda name: abs(fit.radius / RADII[name] - 1))
    if abs(fit.radius / RADII[size] - 1) > RADIUS_TOLERANCE:
        raise _RefusedError(f"size between the two: radius {fit.radius:.2f}, {size} is {RADII[size]}")
    return size


def _refuse_leftover(shares: Array, fit: _Fit) -> None:
    leftover = np.abs(shares - _template(fit.shape, fit.radius, fit.centre, shares))
    side = round(min(shares.shape) * LEFTOVER_SIDE)
    windows = np.lib.stride_tricks.sliding_window_view(leftover, (side, side))
    if float(windows.mean(axis=(2, 3)).max()) > LEFTOVER_SHARE:
        raise _RefusedError(f"more or less than one {fit.shape}: {side}x{side} pixels differ from its best fit")
