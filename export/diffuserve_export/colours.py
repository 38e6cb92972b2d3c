"""What colour a latent stands for: the linear map that previews are made with."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffuserve.manifest import LatentColours
from diffuserve_export.modules import VaeEncoder

__all__ = ["colours_of", "patchwork"]

_PICTURES: Final = 8
_SIDE: Final = 16  # of each, in latents
_SEED: Final = 20


@torch.no_grad()
def colours_of(decoder: nn.Module, latent_scale: int) -> LatentColours:
    """The least-squares fit of a VaeDecoder's pixels, averaged over each latent's, by the latent's channels.

    It is fitted on latents of drawn pictures as the decoder's own autoencoder encodes them, since noise decodes to
    textures that no picture has.
    """
    pictures = patchwork(_PICTURES, _SIDE * latent_scale)
    encoder = VaeEncoder(decoder.model).eval()
    latents = encoder(pictures).chunk(2, dim=1)[0]
    pixels = functional.avg_pool2d(decoder(latents).clamp(-1, 1), latent_scale)
    known, wanted = (tensor.double().movedim(1, -1).flatten(0, 2).numpy() for tensor in (latents, pixels))
    columns = np.column_stack([known, np.ones(len(known))])
    fit, *_ = np.linalg.lstsq(columns, wanted, rcond=1e-6)
    return LatentColours(tuple(map(tuple, fit[:-1].T.tolist())), tuple(fit[-1].tolist()))


def patchwork(count: int, side: int) -> Tensor:
    """Pictures [count, 3, side, side] in -1 to 1: two smooth runs of colours each, with a wavy edge between them."""
    generator = torch.Generator().manual_seed(_SEED)

    def smooth(channels: int, points: int, mode: str) -> Tensor:
        drawn = torch.rand((count, channels, points, points), generator=generator) * 2 - 1
        return functional.interpolate(drawn, size=(side, side), mode=mode, align_corners=True)

    one, other = smooth(3, 2, "bilinear"), smooth(3, 2, "bilinear")
    return torch.where(smooth(1, 4, "bicubic") > 0, one, other)
