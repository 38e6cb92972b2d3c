"""Encoded pictures and masks to send, good ones and bad ones."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["SVG", "encoded", "mask", "picture", "png_of_size"]

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>'


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """Noise."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def mask(width: int = 64, height: int = 64, box: tuple[int, int, int, int] = (8, 16, 48, 40)) -> Image.Image:
    """White in the box."""
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).rectangle(box, fill=255)
    return drawn


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says that size, over hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )
