"""The VAE's pixels -> an encoded picture, and a request's encoded picture -> pixels."""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from contextlib import suppress
from io import BytesIO
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageOps

from diffuserve.errors import ComponentFailedError, InvalidArgumentError
from diffuserve.request import MAX_IMAGE_BYTES

__all__ = [
    "encode_image",
    "image_from_pixels",
    "levels_from_image",
    "mask_from_image",
    "pixels_from_image",
    "read_image",
    "read_pictures",
    "resized",
]

MAX_IMAGE_PIXELS: Final = 4096 * 4096
#: Formats that are read: none of them names files, runs code, or is a page to be drawn.
_READ: Final = ("PNG", "JPEG", "WEBP")
_LIGHT: Final = 128

#: Each scan of a JPEG takes as long as the whole picture, also where it has 33 bytes. Encoders make about ten.
_MAX_SCANS: Final = 64
#: A file of the largest size has 512 where they are full.
_MAX_SEGMENTS: Final = 4096
#: A marker, beyond those that restart a scan. It cannot occur in a scan's data.
_MARKER: Final = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_SOF, _EOI, _SOS = 0xC0, 0xD9, 0xDA

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


def read_image(name: str, data: bytes) -> Image.Image:
    """A picture of a request, RGB and upright. `name` is its input, for the errors; base64 is taken too.

    Raises InvalidArgumentError for what is no PNG, JPEG or WebP, is damaged, or is beyond the limits, which are checked
    before anything is decoded.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise _refused(name, f"has {len(data)} bytes, and at most {MAX_IMAGE_BYTES} are taken; make it smaller")
    with suppress(binascii.Error):
        data = base64.b64decode(data, validate=True)
    if data.startswith(b"\xff\xd8"):
        _check_scans(name, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(BytesIO(data), formats=_READ)
    except Image.DecompressionBombError as error:
        raise _refused(
            name, f"has more pixels than the {MAX_IMAGE_PIXELS} in all that are taken; make it smaller"
        ) from error
    except Exception as error:
        raise _refused(name, f"is no picture in {', '.join(_READ)}; convert it") from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise _refused(
            name, f"has {width} x {height} pixels, and at most {MAX_IMAGE_PIXELS} in all are taken; make it smaller"
        )
    try:
        upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255 where it should scale them
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")
    except Exception as error:  # whatever a damaged file makes a codec raise
        raise _refused(name, f"cannot be decoded ({error}); send the whole file") from error


def _check_scans(name: str, data: bytes) -> None:
    """Raise InvalidArgumentError for a JPEG that takes long to decode though it is small.

    Markers are found as libjpeg finds them: in no segment, and nothing counts after the end of the first picture.
    """
    place = scans = segments = 0
    while (found := _MARKER.search(data, place)) and (marker := found[1][0]) != _EOI:
        place = found.end()
        if marker >= _SOF and place > 2:  # others, and the start of the picture, have no length
            place += int.from_bytes(data[place : place + 2], "big")
        scans, segments = scans + (marker == _SOS), segments + 1
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            raise _refused(
                name,
                f"is a JPEG of more than {_MAX_SCANS} scans or {_MAX_SEGMENTS} segments, which takes long to decode; "
                "save it again",
            )


def read_pictures(init_image: bytes, mask_image: bytes) -> tuple[Image.Image | None, Image.Image | None]:
    """Both pictures of a request, None where there is none. Raises InvalidArgumentError as `read_image` does, and where
    the mask has another size than the picture.
    """
    image = read_image("init_image", init_image) if init_image else None
    mask = read_image("mask_image", mask_image) if mask_image else None
    if image is not None and mask is not None and mask.size != image.size:
        raise _refused(
            "mask_image",
            f"has {mask.size[0]} x {mask.size[1]} pixels and init_image {image.size[0]} x {image.size[1]}; give a mask "
            "of the picture's size",
        )
    return image, mask


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in that size, as diffusers' VaeImageProcessor makes it."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def mask_from_image(image: Image.Image) -> torch.Tensor:
    """A mask [1, H, W] bool, true where the picture is light, as diffusers' mask processor reads it."""
    return torch.from_numpy(np.array(image.convert("L")) >= _LIGHT)[None]


def pixels_from_image(image: Image.Image) -> torch.Tensor:
    """Pixels [3, H, W] float32 in -1 to 1, as diffusers' VaeImageProcessor makes them."""
    levels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (levels / 255).permute(2, 0, 1) * 2 - 1


def levels_from_image(image: Image.Image) -> torch.Tensor:
    """An RGB picture's levels [3, H, W] uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _refused(name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} {reason}", input=name)


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """The picture's file in `image_format`."""
    file = BytesIO()
    image.save(file, format=image_format.upper(), **_SAVE_OPTIONS[image_format])
    return file.getvalue()
