"""The table that the denoising loop multiplies by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from diffuserve.errors import UnsupportedError

__all__ = ["HISTORY", "CompileError", "Trajectory"]

HISTORY: Final = 3  # how many earlier u the update may use, beside the newest

Vector = npt.NDArray[np.float64]


class CompileError(UnsupportedError):
    """A scheduler, or its config, that cannot be expressed as a Trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampler over a number of steps, as the numbers of each UNet evaluation.

    Evaluation k, with latents x, model output m (after guidance) and fresh noise n, does

        u  = p x + q m
        x' = a x + b[0] u + b[1] u1 + b[2] u2 + b[3] u3 + c n

    where u1, u2, u3 are the u of the evaluations before, newest first; u is put in front of them afterwards
    unless `remember` is false. All arrays have one row an evaluation; `b` is [evaluations, 1 + HISTORY].

    timestep      what the UNet is told
    input_scale   what the latents are multiplied by on their way into the UNet
    draws         how many times standard noise is drawn; n is the last draw
    steps_done    how many denoising steps are complete after the evaluation (Heun's two evaluations are one step)
    initial_scale what standard noise is multiplied by to give the first x
    image_scale   what a given picture's latents are multiplied by and added to it; 0 where there is none
    kept_image    where a mask keeps a given picture, its latents are put back after the evaluation: multiplied by this,
    kept_noise    with the noise of the first x, multiplied by this, added to them
    p0, q0        the x0 that the model predicts there, the picture's latents as it sees them by then: p0 x + q0 m
    strength      how much of the schedule is left to a given picture, above 0 to 1; None where there is none
    schedule      the sigma schedule; None is what the checkpoint's config says
    residual      the largest relative error with which the table makes diffusers' own step
    """

    sampler: str
    steps: int
    schedule: str | None = None
    eta: float = 0.0
    residual: float = 0.0
    strength: float | None = None
    image_scale: float = 0.0
    initial_scale: float
    timestep: Vector
    input_scale: Vector
    p: Vector
    q: Vector
    a: Vector
    b: Vector
    c: Vector
    kept_image: Vector
    kept_noise: Vector
    p0: Vector
    q0: Vector
    remember: npt.NDArray[np.bool_]
    draws: npt.NDArray[np.int64]
    steps_done: npt.NDArray[np.int64]

    @property
    def evaluations(self) -> int:
        return len(self.timestep)

    def coefficients(self) -> npt.NDArray[np.float32]:
        """The update's numbers as the loop takes them, [evaluations, 6 + HISTORY + 1]: input_scale, p, q, a, c, b."""
        columns = np.column_stack([self.input_scale, self.p, self.q, self.a, self.c, self.b])
        return np.asarray(columns, dtype=np.float32)
