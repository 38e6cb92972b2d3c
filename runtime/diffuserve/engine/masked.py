"""Pictures of which a mask says what is made anew: what their images have beside the others, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffuserve.engine.track import Track

__all__ = ["Kept", "Masked", "masks_told"]


@dataclass(frozen=True, eq=False, slots=True)
class Masked:
    """What an image with a mask has beside its own latents.

    mask     [1, h, w] bool, true where the picture is made anew
    latents  [C, h, w] float32 of the given picture; where the UNet is told the mask, of what the mask leaves of it
    noise    [C, h, w] float32, that of the first latents: with it the given picture's are put back around what is made
             anew, after every evaluation. None where the UNet is told the mask: then nothing is put back
    """

    mask: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor | None = None

    def around(self, predicted: torch.Tensor) -> torch.Tensor:
        """Predicted latents [C, h, w] with the given picture's where those are put back."""
        if self.noise is None:
            return predicted
        return torch.where(self.mask.to(predicted.device), predicted, self.latents.to(predicted.device))


def masks_told(tracks: Sequence[Track], device: torch.device) -> torch.Tensor | None:
    """The channels of the UNet's `sample` behind the latents, as SAMPLE_INPAINT lists them: [images, 1 + C, h, w].

    None where the UNet is told none: in a group either every image tells its mask or none does.
    """
    told = [one.masked for one in tracks if one.masked is not None and one.masked.noise is None]
    channels = [torch.cat([one.mask.to(one.latents.dtype), one.latents]) for one in told]
    return torch.stack(channels).to(device) if channels else None


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """The images of a batch whose given pictures are put back, with their places [kept] in it.

    `mask` [kept, 1, h, w], `latents` and `noise` [kept, C, h, w] are theirs, as Masked has them.
    """

    tracks: tuple[Track, ...]
    places: torch.Tensor
    mask: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def among(cls, tracks: Sequence[Track], device: torch.device) -> Kept | None:
        """None where there is no such image."""
        places, kept, masks, latents, noise = [], [], [], [], []
        for place, track in enumerate(tracks):
            if track.masked is not None and track.masked.noise is not None:
                places.append(place)
                kept.append(track)
                masks.append(track.masked.mask)
                latents.append(track.masked.latents)
                noise.append(track.masked.noise)
        if not places:
            return None
        stacked = [torch.stack(each).to(device) for each in (masks, latents, noise)]
        return cls(tuple(kept), torch.tensor(places, device=device), *stacked)

    def put_back(self, updated: torch.Tensor) -> None:
        """Around the masks, make the batch's latents [images, C, h, w] those given, as noisy as the next call's."""
        scales = [
            (one.trajectory.kept_image[one.evaluation], one.trajectory.kept_noise[one.evaluation])
            for one in self.tracks
        ]
        numbers = torch.tensor(scales, dtype=torch.float32, device=updated.device)[:, :, None, None, None]
        given = numbers[:, 0] * self.latents + numbers[:, 1] * self.noise
        updated[self.places] = torch.where(self.mask, updated[self.places], given)
