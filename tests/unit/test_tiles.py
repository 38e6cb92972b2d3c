"""Tiles cover a picture evenly, overlap enough, and leave nothing to be seen where they meet."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from diffuserve.tiles import OVERLAP, Side, run_tiled


@pytest.mark.parametrize("longest", [4, 8, 12, 16, 64, 128])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 17, 24, 64, 96, 129, 192, 256])
def test_a_side_is_covered_evenly_with_overlap(length: int, longest: int) -> None:
    side = Side.of(length, longest)
    assert side.tile == min(length, longest)
    assert (side.starts[0], side.starts[-1] + side.tile) == (0, length)
    gaps = {after - before for before, after in zip(side.starts, side.starts[1:], strict=False)}
    assert all(side.tile - gap >= int(OVERLAP * side.tile) for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    # One tile fewer would not do.
    assert (len(side.starts) - 1) * (longest - round(longest * OVERLAP)) < length or length <= longest


def test_weights_add_up_to_one_and_fall_towards_a_neighbour() -> None:
    side = Side.of(24, 16)
    first, last = (side.weights(number, 2) for number in (0, 1))
    assert side.starts == (0, 8)
    assert torch.equal(first[:16], torch.ones(16))
    assert torch.equal(first[16:], last[:16].flip(0))
    assert torch.allclose(first[16:] + last[:16], torch.ones(16))
    assert 0 < last[0] < 0.1
    assert bool((last[1:16] > last[:15]).all())


@pytest.mark.parametrize(("height", "width"), [(5, 24), (24, 20), (8, 8), (33, 8)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_what_needs_no_surroundings_is_the_same_in_tiles(height: int, width: int, rows: int) -> None:
    latents, calls = torch.randn(4, height, width), list[int]()

    def decode(tiles: torch.Tensor) -> torch.Tensor:
        calls.append(len(tiles))
        assert tuple(tiles.shape[1:]) == (4, min(height, 8), min(width, 8))
        return functional.interpolate(tiles[:, :3], scale_factor=8.0).half()

    sides = Side.of(height, 8), Side.of(width, 8)
    pixels = run_tiled(latents, sides, rows, (1, 8), decode)
    expected = decode_whole(latents)
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels, expected, atol=1e-3)
    assert max(calls) <= rows
    assert sum(calls) == len(sides[0].starts) * len(sides[1].starts)
    assert len(calls) == -(-sum(calls) // rows), "equal tiles share calls"


def decode_whole(latents: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(latents[None, :3].half(), scale_factor=8.0)[0].float()


def test_pictures_are_encoded_in_tiles_too() -> None:
    pixels = torch.rand(3, 8 * 20, 8 * 12)
    encoded = run_tiled(
        pixels, (Side.of(20, 8), Side.of(12, 8)), 2, (8, 1), lambda tiles: functional.avg_pool2d(tiles, 8)
    )
    assert torch.allclose(encoded, functional.avg_pool2d(pixels, 8), atol=1e-6)


def test_one_tile_is_the_call_itself() -> None:
    latents = torch.randn(4, 8, 8)
    assert torch.equal(run_tiled(latents, (Side.of(8, 8), Side.of(8, 16)), 4, (1, 1), torch.sin), latents.sin())


def test_tiles_that_disagree_meet_without_an_edge() -> None:
    """Each tile is of another brightness, as another norm makes it: what is left is a slope, as long as the overlap."""
    drawn = iter(range(9))
    sides = Side.of(16, 8), Side.of(16, 8)
    pixels = run_tiled(
        torch.zeros(1, 16, 16), sides, 1, (1, 8), lambda tiles: torch.full((1, 3, 64, 64), float(next(drawn)))
    )
    steps = [pixels.diff(dim=dimension).abs().max() for dimension in (1, 2)]
    overlap = 8 * (8 - (sides[0].starts[1] - sides[0].starts[0]))
    assert overlap == 32
    assert float(steps[0]) <= 3 / overlap + 1e-5
    assert float(steps[1]) <= 1 / overlap + 1e-5
