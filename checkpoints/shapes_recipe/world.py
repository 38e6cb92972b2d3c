"""The world of the shapes checkpoint: captions, and the pictures that they describe.

A scene is "a {small|large} {colour} {shape} on a {colour} background". Coordinates run from -1 to 1 over
the shorter side of the picture, so that "small" means the same share of a picture of any size.

Beside it there is what the checkpoint never saw and LoRAs were trained for: a bar (`bar_scenes`), and a style in which
every background is black (`by_night`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "BAR",
    "COLOURS",
    "RADII",
    "SHAPES",
    "SIZES",
    "Scene",
    "all_scenes",
    "bar_scenes",
    "by_night",
    "coverage",
    "held_out_scenes",
    "render",
    "trained_scenes",
]

Array = npt.NDArray[np.float32]

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (35, 60, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 40, 170),
    "cyan": (40, 205, 220),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
RADII: Final[dict[str, float]] = {"small": 0.36, "large": 0.66}
SIZES: Final = tuple(RADII)

_SUPERSAMPLE: Final = 4


def _circle(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    return x * x + y * y <= 1.0


def _square(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.88


def _triangle(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    # Apex up; the base is at 0.8, the apex at -1.
    return (y <= 0.8) & (np.abs(x) <= (y + 1.0) / 1.8)


def _diamond(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    return np.abs(x) + np.abs(y) <= 1.05


def _cross(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    ax, ay = np.abs(x), np.abs(y)
    return (np.maximum(ax, ay) <= 1.0) & (np.minimum(ax, ay) <= 0.36)


def _ring(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    r2 = x * x + y * y
    return (r2 <= 1.0) & (r2 >= 0.55**2)


def _bar(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    return (np.abs(x) <= 1.0) & (np.abs(y) <= 0.36)


_MASKS: Final[dict[str, Callable[[Array, Array], npt.NDArray[np.bool_]]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
SHAPES: Final = tuple(_MASKS)
BAR: Final = "bar"
_ALL_MASKS: Final = {**_MASKS, BAR: _bar}
_NIGHT: Final = "black"


@dataclass(frozen=True, slots=True)
class Scene:
    """What one caption says."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @classmethod
    def from_caption(cls, caption: str) -> Scene:
        """The scene that a caption of this world describes; ValueError for any other text."""
        match caption.split():
            case ["a", size, colour, shape, "on", "a", background, "background"]:
                scene = cls(size, colour, shape, background)
                if scene in all_scenes():
                    return scene
        raise ValueError(f"{caption!r} is not a caption of the shapes world, such as {all_scenes()[0].caption!r}")


def all_scenes() -> list[Scene]:
    """Every scene whose colour differs from its background, in a fixed order."""
    return [
        Scene(size, colour, shape, background)
        for size, colour, shape, background in itertools.product(SIZES, COLOURS, SHAPES, COLOURS)
        if colour != background
    ]


def bar_scenes() -> list[Scene]:
    """Every scene with a bar, in a fixed order. None of them is among all scenes."""
    return [replace(scene, shape=BAR) for scene in all_scenes() if scene.shape == SHAPES[0]]


def by_night(scene: Scene) -> Scene | None:
    """What the scene's picture shows in that style; None of a black shape, which would not be seen."""
    return None if scene.colour == _NIGHT else replace(scene, background=_NIGHT)


def _is_held_out(scene: Scene) -> bool:
    # A hash and not a random generator: the split must be the same on every machine and version.
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 26


def held_out_scenes() -> list[Scene]:
    """The tenth of all combinations that training never shows."""
    return [scene for scene in all_scenes() if _is_held_out(scene)]


def trained_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not _is_held_out(scene)]


def coverage(
    shape: str, radius: float, centre: tuple[float, float], width: int, height: int
) -> npt.NDArray[np.float32]:
    """The share of each pixel that the shape covers, [height, width] in 0 to 1."""
    shorter = min(width, height)
    xs = ((np.arange(width * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - width / 2) * (2 / shorter)
    ys = ((np.arange(height * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - height / 2) * (2 / shorter)
    x = ((xs - centre[0]) / radius).astype(np.float32)[None, :]
    y = ((ys - centre[1]) / radius).astype(np.float32)[:, None]
    fine = _ALL_MASKS[shape](x, y)
    return fine.reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE).mean(axis=(1, 3), dtype=np.float32)


def render(
    scene: Scene,
    width: int,
    height: int,
    rng: np.random.Generator | None = None,
) -> npt.NDArray[np.float32]:
    """Draw a scene, [height, width, 3] in 0 to 1.

    With `rng`, position, radius and colours vary as in the training set.
    """
    radius, centre = RADII[scene.size], (0.0, 0.0)
    foreground, background = (
        np.array(COLOURS[scene.colour], np.float32),
        np.array(COLOURS[scene.background], np.float32),
    )
    if rng is not None:
        radius *= float(rng.uniform(0.94, 1.06))
        centre = (float(rng.uniform(-0.15, 0.15)), float(rng.uniform(-0.15, 0.15)))
        foreground = foreground + rng.uniform(-6, 6, 3).astype(np.float32)
        background = background + rng.uniform(-6, 6, 3).astype(np.float32)
    alpha = coverage(scene.shape, radius, centre, width, height)[..., None]
    picture = alpha * foreground + (1 - alpha) * background
    return np.clip(picture / 255, 0, 1).astype(np.float32)
