"""What an image begins with: noise of its seed and, where there are, a given picture and its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffuserve.engine import Masked
from diffuserve.sampling import Trajectory
from diffuserve.snapshot import ImageState

__all__ = ["Given", "begun"]


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What the autoencoder made of a request's pictures, for all of its images.

    picture         mean and standard deviation [2, C, h, w] float32 of init_image's latents; None where nothing of the
                    first latents is its
    mask            [1, h, w] bool, true where the picture is made anew; None where all of it is
    masked_picture  as `picture`, of init_image without what the mask covers; None where the UNet is told no mask
    """

    picture: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    masked_picture: torch.Tensor | None = None


def begun(image: ImageState, trajectory: Trajectory, given: Given, draw: Callable[[], torch.Tensor]) -> ImageState:
    """`image`, with its first latents. `draw` gives standard noise [C, h, w] of its seed.

    Draws come in the order of diffusers' pipelines: the picture's latents, the noise, the masked picture's latents.
    """
    drawn = 0

    def standard() -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return draw()

    def sampled(moments: torch.Tensor) -> torch.Tensor:
        return moments[0] + moments[1] * standard()

    picture = None if given.picture is None else sampled(given.picture)
    noise = standard()
    latents = noise * trajectory.initial_scale
    if picture is not None:
        latents = latents + trajectory.image_scale * picture
    masked = None
    if given.mask is not None and given.masked_picture is not None:
        masked = Masked(given.mask, sampled(given.masked_picture))
    elif given.mask is not None and picture is not None:
        standard()  # for the masked picture, which diffusers encodes and does not use
        masked = Masked(given.mask, picture, noise)
    history = torch.empty(0, *latents.shape)
    return replace(image, draws=drawn, latents=latents, history=history, masked=masked)
