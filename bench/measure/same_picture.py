"""No figure without the same pictures: what every system makes of a few requests, compared with this service's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from diffuserve.request import GenerateRequest
from measure.load import GUIDANCE, closed_loop
from peers.common import SCHEDULERS, Serve
from shapes_recipe.world import trained_scenes

__all__ = ["LEVELS", "check_same_pictures"]

LEVELS = 3  # of 255


def check_same_pictures(ours: Serve, others: Mapping[str, Serve]) -> None:
    """Raise SystemExit where a system's picture differs by more than LEVELS. Leaves every system warm."""
    requests = _requests()
    expected = _pixels(ours, requests)
    for name, serve in others.items():
        worst = max(int(np.abs(a - b).max()) for a, b in zip(_pixels(serve, requests), expected, strict=True))
        if worst > LEVELS:
            raise SystemExit(f"{name} makes other pictures: {worst}/255 apart, and {LEVELS}/255 is allowed; no report")
        print(f"{name}: the same pictures as diffuserve ({worst}/255 at most)", flush=True)


def _requests() -> list[GenerateRequest]:
    first = GenerateRequest(prompt=trained_scenes()[0].caption, steps=8, guidance_scale=GUIDANCE, seed=11)
    asked = [replace(first, sampler=sampler) for sampler in SCHEDULERS]
    return [*asked, replace(asked[0], steps=4, guidance_scale=1.0), replace(asked[-1], guidance_scale=1.0, seed=12)]


def _pixels(serve: Serve, requests: list[GenerateRequest]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int16]]]:
    run = closed_loop(serve, requests, len(requests))
    return [np.asarray(picture.image, dtype=np.int16) for picture in run.pictures]
