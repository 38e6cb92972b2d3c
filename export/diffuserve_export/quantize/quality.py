"""Whether a quantized UNet still makes the pictures that it made in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from diffuserve_export.errors import QualityError

__all__ = ["Quality", "check_quality", "psnr"]

#: What equal pictures are given, in dB: 8 bits a channel cannot show a difference beyond 60.
_EQUAL: Final = 100.0


@dataclass(frozen=True, slots=True)
class Quality:
    """PSNR in dB of pictures against those in float32, of the same prompts and seeds: their mean, and the lowest."""

    pictures: int
    psnr: float
    lowest: float


def psnr(found: Tensor, expected: Tensor) -> Tensor:
    """Of each picture [pictures, 3, H, W] with values 0 to 1, in dB, [pictures]."""
    error = (found - expected).double().square().mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).clamp(max=_EQUAL)


def check_quality(precision: str, found: Tensor, expected: Tensor, gate: float) -> Quality:
    """Raise QualityError where the pictures' mean PSNR is below `gate`, or not a number."""
    each = psnr(found, expected)
    quality = Quality(len(each), round(float(each.mean()), 2), round(float(each.min()), 2))
    if not quality.psnr >= gate:  # written so that a NaN fails
        raise QualityError(
            f"the UNet in {precision} makes other pictures than in float32: their PSNR is {_text(quality.psnr)} over "
            f"{quality.pictures} of them, and the quality gate is {gate:g} dB; calibrate on prompts like those that it "
            "will serve (--calibration), take another precision, or lower --quality-gate"
        )
    return quality


def _text(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.1f} dB"
