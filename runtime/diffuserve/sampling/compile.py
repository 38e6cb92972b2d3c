"""Compile a diffusers scheduler into a Trajectory.

Samplers are linear in the latents, the model's outputs and the noise. So `step()` is run once over a whole
trajectory in float64 on coefficient vectors instead of pictures: the first latents are the unit vector of
axis 0, the k-th model output that of axis 1 + k, and each noise draw that of an axis of its own. What comes out
of `step()` are the coefficients of the new latents in all of these, and a least-squares fit finds the few
numbers (a, b, c) that make the same vector from the latents before and the shortest history.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from diffuserve.errors import UnsupportedError
from diffuserve.sampling.samplers import SAMPLERS, make_scheduler
from diffuserve.sampling.trajectory import HISTORY, Trajectory, Vector

__all__ = ["TOLERANCE", "CompileError", "TrajectoryCompiler", "compile_trajectory"]

TOLERANCE: Final = 1e-6  # relative; diffusers' own float32 casts leave up to 1e-7
CACHED_TRAJECTORIES: Final = 512


class CompileError(UnsupportedError):
    """A scheduler, or its config, that cannot be expressed as a Trajectory."""


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """What one call of `step()` did, as coefficient vectors."""

    timestep: float
    input_scale: float
    before: Vector
    output: Vector
    after: Vector
    noises: tuple[Vector, ...]
    alpha: float
    sigma: float


# How the update remembers the past, tried in this order: (p, q) of u = p x + q m.
_Remembered = Callable[[_Evaluation, str], tuple[float, float]]


def _as_output(evaluation: _Evaluation, prediction: str) -> tuple[float, float]:  # noqa: ARG001 - one signature
    return 0.0, 1.0


def _as_sample(evaluation: _Evaluation, prediction: str) -> tuple[float, float]:
    """Predicted x0, where x = alpha x0 + sigma noise."""
    alpha, sigma = evaluation.alpha, evaluation.sigma
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        # Salimans & Ho 2022, eq. 9-10 for alpha^2 + sigma^2 = 1, rescaled where the sampler works with alpha = 1.
        norm = float(np.hypot(alpha, sigma))
        return alpha / norm**2, -sigma / norm
    return 1 / alpha, -sigma / alpha


def _as_noise(evaluation: _Evaluation, prediction: str) -> tuple[float, float]:
    """Predicted noise, from predicted x0."""
    p, q = _as_sample(evaluation, prediction)
    alpha, sigma = evaluation.alpha, evaluation.sigma
    return (1 - alpha * p) / sigma, -alpha * q / sigma


_REMEMBERED: Final[tuple[_Remembered, ...]] = (_as_output, _as_sample, _as_noise)

# diffusers' modules share the patched name while one compiles.
_PATCH_LOCK: Final = threading.Lock()


@contextmanager
def _one_hot_noise(scheduler: Any, first_axis: int, shape: tuple[int, ...]) -> Iterator[list[torch.Tensor]]:
    """Make the scheduler's module draw unit vectors of fresh axes instead of noise, and list them."""
    module, drawn = sys.modules[type(scheduler).__module__], list[torch.Tensor]()

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        axis = first_axis + len(drawn)
        if axis >= shape[-1]:
            raise CompileError(f"{type(scheduler).__name__} draws noise more than twice an evaluation")
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[..., axis] = 1.0
        drawn.append(noise)
        return noise

    with _PATCH_LOCK:
        original = getattr(module, "randn_tensor", None)
        if original is None:
            yield drawn
            return
        module.randn_tensor = draw  # type: ignore[attr-defined]
        try:
            yield drawn
        finally:
            module.randn_tensor = original  # type: ignore[attr-defined]


def _refuse_nonlinear(scheduler: Any) -> None:
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option):
            raise CompileError(
                f"the checkpoint's scheduler config sets {option}, which is not linear in the latents; set it to false",
                option=option,
            )


def _noise_level(scheduler: Any, position: int, timestep: float, works_unscaled: bool) -> tuple[float, float]:
    """alpha and sigma of x = alpha x0 + sigma noise, in the scale that the scheduler's latents have."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and position < len(sigmas):
        sigma = float(sigmas[position])
        alpha = 1.0 if works_unscaled else 1 / float(np.hypot(1.0, sigma))
        return alpha, sigma * alpha
    product = float(scheduler.alphas_cumprod[int(timestep)])
    return product**0.5, (1 - product) ** 0.5


def _run_scheduler(scheduler: Any, step_options: Mapping[str, Any]) -> list[_Evaluation]:
    """Every evaluation of the scheduler's trajectory, on coefficient vectors."""
    timesteps = list(scheduler.timesteps)
    size = 1 + len(timesteps) + 2 * len(timesteps)
    shape = (1, 1, 1, size)  # some schedulers want a picture's four dimensions
    x = torch.zeros(shape, dtype=torch.float64)
    x[..., 0] = 1.0
    evaluations = []
    with _one_hot_noise(scheduler, 1 + len(timesteps), shape) as drawn:
        for k, t in enumerate(timesteps):
            scaled = scheduler.scale_model_input(x, t)
            peak = int(x.abs().argmax())
            input_scale = float(scaled.flatten()[peak] / x.flatten()[peak])
            output = torch.zeros_like(x)
            output[..., 1 + k] = 1.0
            already = len(drawn)
            after = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
            # Schedulers that keep an index have moved it on by now; the others walk their timesteps in order.
            index = getattr(scheduler, "step_index", None)
            position = k if index is None else int(index) - 1
            alpha, sigma = _noise_level(scheduler, position, float(t), float(scheduler.init_noise_sigma) != 1.0)
            noises = tuple(noise.flatten().numpy() for noise in drawn[already:])
            vectors = (tensor.to(torch.float64).flatten().numpy() for tensor in (x, output, after))
            before_vector, output_vector, after_vector = vectors
            evaluations.append(
                _Evaluation(float(t), input_scale, before_vector, output_vector, after_vector, noises, alpha, sigma)
            )
            x = after.to(torch.float64)
    return evaluations


@dataclass(frozen=True, slots=True)
class _Fit:
    """The numbers of every evaluation, or the first evaluation that no history explains."""

    rows: list[tuple[float, float, float, Vector, float]]  # p, q, a, b, c
    failed_at: int | None
    residual: float


def _fit(evaluations: list[_Evaluation], prediction: str, remembered: _Remembered, forgotten: frozenset[int]) -> _Fit:
    rows: list[tuple[float, float, float, Vector, float]] = []
    history: list[Vector] = []
    for k, evaluation in enumerate(evaluations):
        p, q = remembered(evaluation, prediction)
        u = p * evaluation.before + q * evaluation.output
        b, residual, a, c = np.zeros(1 + HISTORY), float("inf"), 0.0, 0.0
        if not np.isfinite(u).all():
            return _Fit(rows, k, residual)
        noise = list(evaluation.noises[-1:])
        for lags in range(min(HISTORY, len(history)) + 1):
            columns = np.stack([evaluation.before, u, *history[:lags], *noise], axis=1)
            solution, *_ = np.linalg.lstsq(columns, evaluation.after, rcond=1e-14)
            scale = max(1.0, float(np.abs(evaluation.after).max()))
            residual = float(np.abs(columns @ solution - evaluation.after).max()) / scale
            if residual <= TOLERANCE:
                a, c = float(solution[0]), float(solution[2 + lags]) if noise else 0.0
                b[: 1 + lags] = solution[1 : 2 + lags]
                break
        else:
            return _Fit(rows, k, residual)
        rows.append((p, q, a, b, c))
        if k not in forgotten:
            history.insert(0, u)
    return _Fit(rows, None, 0.0)


def _fit_forgetting(
    evaluations: list[_Evaluation], prediction: str, remembered: _Remembered
) -> tuple[_Fit, frozenset[int]]:
    """Fit, and where the history is too short try to leave out one evaluation: PNDM forgets its second."""
    fit = _fit(evaluations, prediction, remembered, frozenset())
    if fit.failed_at is None:
        return fit, frozenset()
    for skipped in range(max(0, fit.failed_at - HISTORY - 1), fit.failed_at):
        again = _fit(evaluations, prediction, remembered, frozenset({skipped}))
        if again.failed_at is None:
            return again, frozenset({skipped})
    return fit, frozenset()


def compile_trajectory(scheduler: Any, steps: int, sampler: str, **step_options: Any) -> Trajectory:
    """The table of a diffusers scheduler over `steps` denoising steps.

    `step_options` go to the scheduler's `step()` (eta). Raises CompileError, naming the option or the residual,
    where the scheduler cannot be expressed.
    """
    _refuse_nonlinear(scheduler)
    scheduler.set_timesteps(steps)
    evaluations = _run_scheduler(scheduler, step_options)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    worst = float("inf")
    for remembered in _REMEMBERED:
        with np.errstate(all="ignore"):
            fit, forgotten = _fit_forgetting(evaluations, prediction, remembered)
        if fit.failed_at is None:
            return _trajectory(scheduler, steps, sampler, evaluations, fit, forgotten)
        worst = min(worst, fit.residual)
    raise CompileError(
        f"{sampler} with {steps} steps is not a linear recurrence over {HISTORY + 1} evaluations "
        f"(residual {worst:.1e}, tolerance {TOLERANCE:.0e}); choose another sampler",
        sampler=sampler,
        steps=steps,
    )


def _trajectory(
    scheduler: Any, steps: int, sampler: str, evaluations: list[_Evaluation], fit: _Fit, forgotten: frozenset[int]
) -> Trajectory:
    count = len(evaluations)
    p, q, a, b, c = (np.array(column, dtype=np.float64) for column in zip(*fit.rows, strict=True))
    return Trajectory(
        sampler=sampler,
        steps=steps,
        initial_scale=float(scheduler.init_noise_sigma),
        timestep=np.array([evaluation.timestep for evaluation in evaluations]),
        input_scale=np.array([evaluation.input_scale for evaluation in evaluations]),
        p=p,
        q=q,
        a=a,
        b=b,
        c=c,
        remember=np.array([k not in forgotten for k in range(count)]),
        draws=np.array([len(evaluation.noises) for evaluation in evaluations]),
        steps_done=np.array([(k + 1) * steps // count for k in range(count)]),
    )


class TrajectoryCompiler:
    """Makes and caches the tables of one checkpoint. Safe to call from several threads."""

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        self._config = dict(scheduler_config)
        own = type(make_scheduler(self._config, None)).__name__
        #: The sampler that the checkpoint's own scheduler is, or None where it has no name here.
        self.default = next((name for name, one in SAMPLERS.items() if one.scheduler_class == own), None)
        self._own_class = own
        self._compiled = lru_cache(maxsize=CACHED_TRAJECTORIES)(self._compile)

    def name(self, sampler: str | None) -> str:
        """The sampler, or the checkpoint's own for None. Raises UnsupportedError where that one is not built."""
        name = sampler or self.default
        if name is None:
            raise UnsupportedError(
                f"the checkpoint's own scheduler {self._own_class} is not built; give a sampler: {', '.join(SAMPLERS)}"
            )
        return name

    def __call__(self, sampler: str | None, steps: int) -> Trajectory:
        """The table, which takes some milliseconds the first time. Raises CompileError where it cannot be made."""
        return self._compiled(self.name(sampler), steps)

    def _compile(self, name: str, steps: int) -> Trajectory:
        return compile_trajectory(make_scheduler(self._config, SAMPLERS[name]), steps, name)
