"""A request, and files of pictures, for tests of what files say of how their pictures were made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diffuserve.metadata import Record
from diffuserve.request import GenerateRequest

REQUEST = GenerateRequest(
    prompt="a (red) circle",
    negative_prompt='blue: "dark", green\nand more',
    checkpoint="shapes",
    width=96,
    height=64,
    steps=9,
    guidance_scale=7.5,
    sampler="dpmpp_2m",
    sigma_schedule="karras",
    seed=12,
    clip_skip=1,
    loras=("night:0.5", "bar"),
)


def encoded(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (7, 9, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, image_format.upper(), **options)
    return file.getvalue()


def record(image_format: str = "png", **changes: Any) -> Record:
    return Record.of(REQUEST, image_format, REQUEST.seed, changes)


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "picture"
    path.write_bytes(data)
    return path
