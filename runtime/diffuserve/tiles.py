"""Pictures that are too large for one call of the autoencoder: overlapping tiles, blended.

As diffusers' AutoencoderKL.tiled_decode, but for two things: tiles are spread evenly, so that all are of one size,
share calls and overlap by more than they must; and where they overlap every one counts, by weights that fall linearly
towards its edge, where it knows least of what is beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from typing import Final

import torch

__all__ = ["OVERLAP", "Side", "run_tiled"]

OVERLAP: Final = 0.25  # of a tile's side, at least


@dataclass(frozen=True, slots=True)
class Side:
    """How one side of a picture is covered: where tiles of `tile` latents begin, of `length` latents in all."""

    length: int
    tile: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, length: int, longest: int) -> Side:
        """`length` in one piece where that is not beyond `longest`, else in as few tiles as overlap enough."""
        if length <= longest:
            return cls(length, length, (0,))
        overlap = max(1, round(longest * OVERLAP))
        gaps = -(-(length - longest) // (longest - overlap))
        return cls(length, longest, tuple(round(i * (length - longest) / gaps) for i in range(gaps + 1)))

    def weights(self, number: int, scale: int) -> torch.Tensor:
        """Of one tile along the side, [tile * scale]: 1, and down towards its neighbours within the overlap."""
        weights = torch.ones(self.tile * scale)
        for other in (number - 1, number + 1):
            if 0 <= other < len(self.starts):
                size = scale * (self.tile - abs(self.starts[number] - self.starts[other]))
                ramp = (torch.arange(size) + 0.5) / size
                if other < number:
                    weights[:size] *= ramp
                else:
                    weights[-size:] *= ramp.flip(0)
        return weights


def run_tiled(
    source: torch.Tensor,
    sides: tuple[Side, Side],
    rows: int,
    scales: tuple[int, int],
    run: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What `run` makes of tiles [n, C, h, w] of `source` [C, H, W], n at most `rows`, as one picture [C', H', W'].

    `sides` are the height's and the width's. `scales` are how many of the source's and of the result's numbers there
    are to a latent along a side: 1 and 8 to decode, 8 and 1 to encode. The result is float32 on the CPU.
    """
    before, after = scales
    height, width = sides
    result, total = torch.empty(0), torch.zeros(height.length * after, width.length * after)
    places = product(range(len(height.starts)), range(len(width.starts)))
    while batch := list(islice(places, rows)):
        outputs = run(torch.stack([_cut(source, sides, place, before) for place in batch])).to("cpu", torch.float32)
        if not result.numel():
            result = torch.zeros(outputs.shape[1], *total.shape)
        for place, output in zip(batch, outputs, strict=True):
            weights = height.weights(place[0], after)[:, None] * width.weights(place[1], after)
            _cut(result, sides, place, after).add_(weights * output)
            _cut(total, sides, place, after).add_(weights)
    return result.div_(total)


def _cut(tensor: torch.Tensor, sides: tuple[Side, Side], place: tuple[int, int], scale: int) -> torch.Tensor:
    """The part [..., h, w] of a picture that one tile covers."""
    for dimension, side, number in zip((-2, -1), sides, place, strict=True):
        tensor = tensor.narrow(dimension, side.starts[number] * scale, side.tile * scale)
    return tensor
