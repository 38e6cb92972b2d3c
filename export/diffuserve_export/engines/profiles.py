"""Optimization profiles from the ranges of sizes and rows: a staircase of boxes under a bound on rows x pixels.

An execution context reserves what its profile's largest shape needs. One box that held 64 rows and 1536 pixels a
side would reserve nine times what either needs with the rows that fit beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from diffuserve.manifest import TensorShape
from diffuserve.profiles import ROWS, Profile, Range
from diffuserve.spec import PROMPT_CHUNKS, UNET
from diffuserve_export.errors import OptionError

__all__ = ["ROW_BUCKETS", "Bounds", "ShapeRanges", "engine_profiles", "tensor_shapes"]

Bounds = tuple[tuple[int, int], ...]

# The most rows at a side in pixels. The autoencoder works in pixels, and its tensors are some fifty times larger.
_UNET_BOUNDS: Final[Bounds] = ((512, 64), (1024, 16), (1536, 4))
_VAE_BOUNDS: Final[Bounds] = ((512, 4), (1536, 1))
# Rows of the static profiles, for which CUDA graphs are captured; a call is padded up to the next.
ROW_BUCKETS: Final = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class ShapeRanges:
    """What an export is made for. `others` are ranges of sides that only some components have."""

    size: Range
    rows: Range
    latent_scale: int
    token_limit: int
    others: Mapping[str, Range]


def engine_profiles(
    component: str,
    inputs: Sequence[TensorShape],
    ranges: ShapeRanges,
    *,
    bounds: Bounds | None = None,
    cuda_graphs: bool = False,
) -> tuple[Profile, ...]:
    """The profiles of a component's engine, static ones first. Raises OptionError for a side without a range."""
    names = {side for one in inputs for side in one.shape if isinstance(side, str)}
    bounds = bounds or (_UNET_BOUNDS if component == UNET else _VAE_BOUNDS)
    sized = names & {"height", "width", "latent_height", "latent_width"}
    steps = _staircase(ranges, bounds) if sized else ((ranges.size, ranges.rows),)
    dynamic = [_profile(component, names, ranges, size, rows) for size, rows in steps]
    static = _static(component, names, ranges, dynamic) if cuda_graphs and component == UNET else []
    return (*static, *dynamic)


def _staircase(ranges: ShapeRanges, bounds: Bounds) -> list[tuple[Range, Range]]:
    """Boxes of sizes and rows, larger pictures and fewer rows from one to the next."""
    size, steps = ranges.size, list[tuple[Range, Range]]()
    for side, bound in _anchors(size, bounds):
        highest, rows = min(side, size.max), min(bound, ranges.rows.max)
        if steps and steps[-1][1].max <= rows:  # it holds the box before
            steps.pop()
        smaller = steps[-1][0].max if steps else 0
        opt = size.opt if smaller < size.opt <= highest or not steps else highest
        steps.append(
            (
                Range(size.min, min(opt, highest), highest, size.step),
                Range(ranges.rows.min, min(ranges.rows.opt, rows), rows),
            )
        )
    return steps


def _anchors(size: Range, bounds: Bounds) -> list[tuple[int, int]]:
    """`bounds` with the checkpoint's own size among them, down to the first that holds every size, and up to it."""
    anchors = sorted(bounds)
    below = [(side, rows) for side, rows in anchors if side < size.opt]
    if below and all(side != size.opt for side, _ in anchors) and size.opt < anchors[-1][0]:
        anchors.append((size.opt, _rows_of_area(*below[-1], size.opt)))
    if size.max > max(side for side, _ in anchors):
        anchors.append((size.max, _rows_of_area(*max(anchors), size.max)))
    anchors = [(side // size.step * size.step, rows) for side, rows in sorted(anchors) if side >= size.min]
    enough = next(index for index, (side, _) in enumerate(anchors) if side >= size.max)
    return anchors[: enough + 1]


def _rows_of_area(side: int, rows: int, other: int) -> int:
    return max(1, rows * side * side // (other * other))


def _profile(component: str, names: set[str], ranges: ShapeRanges, size: Range, rows: Range) -> Profile:
    scale, limit = ranges.latent_scale, ranges.token_limit
    latent = Range(size.min // scale, size.opt // scale, size.max // scale, max(1, size.step // scale))
    known = {
        ROWS: rows,
        "height": size,
        "width": size,
        "latent_height": latent,
        "latent_width": latent,
        "tokens": Range(limit, limit, limit * max(PROMPT_CHUNKS), limit),
        # Of textual inversion: every token of every row may be one, but the marks of its begin and end.
        "vectors": Range(1, 1, rows.max * (limit - 2)),
        **ranges.others,
    }
    if unknown := sorted(names - known.keys()):
        raise OptionError(f"{component} has sides without a range: {', '.join(unknown)}; known: {', '.join(known)}")
    return Profile({name: known[name] for name in sorted(names)})


def _static(component: str, names: set[str], ranges: ShapeRanges, dynamic: Sequence[Profile]) -> list[Profile]:
    """One profile for each row bucket, at the checkpoint's own size with one chunk of tokens."""
    own = ranges.size.opt
    size = Range(own, own, own, ranges.size.step)
    exact = _profile(component, names, ranges, size, ranges.rows)
    sides = {name: Range(side.opt, side.opt, side.opt, side.step) for name, side in exact.sides.items()}
    others = {name: side.opt for name, side in sides.items() if name != ROWS}
    most = max(one.sides[ROWS].max for one in dynamic if one.takes(others))
    return [Profile({**sides, ROWS: Range(rows, rows, rows)}) for rows in ROW_BUCKETS if rows <= most]


def tensor_shapes(inputs: Sequence[TensorShape], profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """min, opt and max shape of each input in a profile, as TensorRT takes them."""

    def shape(tensor: TensorShape, bound: str) -> tuple[int, ...]:
        return tuple(getattr(profile.sides[side], bound) if isinstance(side, str) else side for side in tensor.shape)

    return {one.name: tuple(shape(one, bound) for bound in ("min", "opt", "max")) for one in inputs}
