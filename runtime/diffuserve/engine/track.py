"""One image on its way through the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffuserve.sampling import Trajectory

__all__ = ["Track"]

_NOTHING: Callable[..., None] = lambda *_: None  # noqa: E731 - a default for callbacks that a test leaves out


@dataclass(eq=False, slots=True, kw_only=True)
class Track:
    """One image's state, as it joins: the loop copies its tensors into a pool slot and counts its evaluations.

    latents              [C, h, w] float32, already scaled by the trajectory's initial_scale
    hidden_states        [rows, tokens, D]: the prompt's, then, with guidance, the negative prompt's
    generator            the source of fresh noise; the one that drew the first latents
    on_step(done)        whenever a denoising step is complete, with their number
    on_latents(latents)  once, with the final latents [C, h, w] float32
    on_error(error)      once, instead
    is_cancelled()       asked before each step
    """

    group: tuple[str, int, int]
    trajectory: Trajectory
    guidance_scale: float
    latents: torch.Tensor
    hidden_states: torch.Tensor
    generator: torch.Generator
    on_latents: Callable[[torch.Tensor], None] = _NOTHING
    on_error: Callable[[BaseException], None] = _NOTHING
    on_step: Callable[[int], None] = _NOTHING
    is_cancelled: Callable[[], bool] = lambda: False
    coefficients: Any = field(init=False)
    slot: int = -1
    evaluation: int = 0
    joined: int = 0
    joined_at_step: int = 0
    started_at: float = 0.0
    last_stepped: int = 0

    def __post_init__(self) -> None:
        self.coefficients = torch.from_numpy(self.trajectory.coefficients())

    @property
    def rows(self) -> int:
        return int(self.hidden_states.shape[0])

    @property
    def is_done(self) -> bool:
        return self.evaluation == self.trajectory.evaluations

    def steps_done(self, evaluations: int) -> int:
        """How many denoising steps are complete after that many evaluations."""
        return int(self.trajectory.steps_done[evaluations - 1]) if evaluations else 0
