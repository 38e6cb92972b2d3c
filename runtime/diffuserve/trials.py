"""Calls that measure the engines' costs, for a loop that is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from diffuserve.engine import CALIBRATION_ROWS, Group, Trial
from diffuserve.errors import ComponentFailedError
from diffuserve.keeper import Keeper
from diffuserve.registry import CheckpointRegistry
from diffuserve.spec import UNET

__all__ = ["trials"]

_TRIALS: Final = 3


def trials(checkpoints: CheckpointRegistry, keeper: Keeper) -> Iterator[Trial]:
    """Calls that measure each checkpoint at the size that its engine is built for, the smallest first."""
    for checkpoint in checkpoints.values():
        size = checkpoint.manifest.size.opt
        group = Group(checkpoint.name, size, size)
        most = checkpoint.manifest.max_rows(UNET, size, size)
        counts = [*(count for count in CALIBRATION_ROWS if count < most), most]
        for rows in counts[:1] + _TRIALS * counts:  # what the very first call takes is of no use
            run = partial(_tried, keeper, checkpoint.name, checkpoint.trial(group, rows))
            yield Trial(group, rows, run, partial(keeper.is_there, checkpoint.name))


def _tried(keeper: Keeper, name: str, run: Callable[[], object]) -> None:
    """A trial keeps the components that it calls, and is no use of them.

    Raises ComponentFailedError where they have left since it was possible: what was not run must not be measured.
    """
    if not keeper.hold(name):
        raise ComponentFailedError(f"{name} is not in memory", checkpoint=name)
    try:
        run()
    finally:
        keeper.let_go(name)
