"""The VAE's pixels -> an encoded picture."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import torch
from PIL import Image

from diffuserve.errors import ComponentFailedError

__all__ = ["encode_image", "image_from_pixels"]

# High enough that what a viewer sees is the model's picture, not the codec's.
_SAVE_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


def image_from_pixels(pixels: torch.Tensor) -> Image.Image:
    """An RGB image from one picture [3, H, W], float, in -1 to 1 (beyond is clamped), rounded as diffusers rounds.

    Raises ComponentFailedError where the pixels are not finite: an overflow in the UNet or the VAE ends here.
    """
    if not bool(torch.isfinite(pixels).all()):
        raise ComponentFailedError("the picture has pixels that are not finite: the engine's precision overflowed")
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.contiguous().numpy())


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """The picture's file in `image_format`."""
    file = BytesIO()
    image.save(file, format=image_format.upper(), **_SAVE_OPTIONS[image_format])
    return file.getvalue()
