"""Compile a diffusers scheduler into a Trajectory.

Samplers are linear in the latents, the model's outputs and the noise. So `step()` is run once over a whole
trajectory in float64 on coefficient vectors instead of pictures: the first latents are the unit vector of
axis 0, the k-th model output that of axis 1 + k, and each noise draw that of an axis of its own. What comes out
of `step()` are the coefficients of the new latents in all of these, and a least-squares fit finds the few
numbers (a, b, c) that make the same vector from the latents before and the shortest history.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from diffuserve.sampling.trajectory import HISTORY, CompileError, Trajectory, Vector

__all__ = ["TOLERANCE", "compile_trajectory"]

TOLERANCE: Final = 1e-6  # relative; above it a scheduler is refused
CAST: Final = 1e-7  # what diffusers' own casts to float32 leave
EXACT: Final = 1e-10  # what is as good as float64 gets


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
    kept: tuple[float, float]


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


def _refuse_by_config(scheduler: Any, steps: int, sampler: str) -> None:
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option):
            raise CompileError(
                f"the checkpoint's scheduler config sets {option}, which is not linear in the latents; set it to false "
                f"or choose a sampler that has no {option}",
                option=option,
            )
    if not scheduler.config.get("skip_prk_steps", True):
        raise CompileError(
            "the checkpoint's scheduler config has skip_prk_steps false: those Runge-Kutta steps weigh more than "
            f"{HISTORY + 1} evaluations; set it to true, or choose another sampler than {sampler}",
            option="skip_prk_steps",
        )
    if (most := scheduler.config.get("original_inference_steps", steps)) < steps:
        raise CompileError(
            f"steps is {steps}, and {sampler} takes at most {most}, the steps that its distillation was made of "
            "(original_inference_steps); ask for fewer",
            sampler=sampler,
            steps=steps,
            maximum=most,
        )


@contextmanager
def _naming_diffusers(scheduler: Any, steps: int, sampler: str) -> Iterator[None]:
    """What diffusers itself refuses, told as ours."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:  # whatever its code runs into: also IndexError and TypeError at few steps
        raise CompileError(
            f"diffusers' {type(scheduler).__name__} does not take this checkpoint's config: "
            f"{str(error) or type(error).__name__}; choose another sampler than {sampler}",
            sampler=sampler,
            steps=steps,
        ) from error


def _integrate_quickly(scheduler: Any) -> None:
    """Let LMS integrate over plain floats: over tensors, quadrature takes it 6 ms a step."""
    if hasattr(scheduler, "get_lms_coefficient"):
        plain = SimpleNamespace(sigmas=scheduler.sigmas.tolist())
        scheduler.get_lms_coefficient = partial(type(scheduler).get_lms_coefficient, plain)


def _noise_level(scheduler: Any, position: int, timestep: float, input_scale: float) -> tuple[float, float]:
    """alpha and sigma of x = alpha x0 + sigma noise, in the scale that the scheduler's latents have."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and float(scheduler.init_noise_sigma) != 1.0:
        # Latents with alpha = 1 are divided by hypot(1, sigma) for the UNet, which tells the sigma: KDPM2's second
        # evaluation is at one between two steps.
        known = torch.cat([sigmas, getattr(scheduler, "sigmas_interpol", sigmas)]).double()
        told = float(np.sqrt(max(0.0, input_scale**-2 - 1)))
        return 1.0, float(known[int((known - told).abs().nan_to_num(nan=torch.inf).argmin())])
    if sigmas is not None and position < len(sigmas):
        sigma = float(sigmas[position])
        alpha = 1 / float(np.hypot(1.0, sigma))
        return alpha, sigma * alpha
    product = float(scheduler.alphas_cumprod[int(timestep)])
    return product**0.5, (1 - product) ** 0.5


@torch.inference_mode()
def _run_scheduler(scheduler: Any, begin: int, step_options: Mapping[str, Any]) -> list[_Evaluation]:
    """Every evaluation of the scheduler's trajectory from timestep number `begin` on, on coefficient vectors."""
    timesteps = list(scheduler.timesteps[begin:])
    size = 1 + len(timesteps) + 2 * len(timesteps)
    last = len(timesteps) - 1
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
            if not bool(after.isfinite().all()):
                raise CompileError(
                    f"{type(scheduler).__name__} itself divides by zero at step {k + 1} of {len(timesteps)}, as with "
                    "epsilon at zero terminal SNR; choose another sampler or sigma_schedule"
                )
            # Schedulers that keep an index have moved it on by now; the others walk their timesteps in order.
            index = getattr(scheduler, "step_index", None)
            position = begin + k if index is None else int(index) - 1
            alpha, sigma = _noise_level(scheduler, position, float(t), input_scale)
            noises = tuple(noise.flatten().numpy() for noise in drawn[already:])
            vectors = (tensor.to(torch.float64).flatten().numpy() for tensor in (x, output, after))
            before_vector, output_vector, after_vector = vectors
            # As diffusers' inpainting pipelines: to the noise of the next evaluation, also in the middle of a step.
            kept = (1.0, 0.0) if k == last else _noised(scheduler, timesteps[k + 1])
            evaluations.append(
                _Evaluation(
                    float(t), input_scale, before_vector, output_vector, after_vector, noises, alpha, sigma, kept
                )
            )
            x = after.to(torch.float64)
    return evaluations


@dataclass(frozen=True, slots=True)
class _Row:
    """The numbers of one evaluation, and how far they are from diffusers' own step."""

    p: float
    q: float
    a: float
    b: Vector
    c: float
    residual: float


@dataclass(frozen=True, slots=True)
class _Fit:
    """The numbers of every evaluation, or the first evaluation that no history explains."""

    rows: list[_Row]
    failed_at: int | None = None
    residual: float = 0.0
    forgotten: frozenset[int] = frozenset()


def _fit_one(evaluation: _Evaluation, u: Vector, history: list[Vector], p: float, q: float) -> _Row:
    """The shortest history that explains the evaluation: a longer one would have to be clearly better."""
    noise = list(evaluation.noises[-1:])
    scale = max(1.0, float(np.abs(evaluation.after).max()))
    best: _Row | None = None
    for lags in range(min(HISTORY, len(history)) + 1):
        columns = np.stack([evaluation.before, u, *history[:lags], *noise], axis=1)
        solution, *_ = np.linalg.lstsq(columns, evaluation.after, rcond=1e-14)
        residual = float(np.abs(columns @ solution - evaluation.after).max()) / scale
        if best is not None and best.residual <= TOLERANCE and residual > best.residual / 4:
            break
        b = np.zeros(1 + HISTORY)
        b[: 1 + lags] = solution[1 : 2 + lags]
        best = _Row(p, q, float(solution[0]), b, float(solution[2 + lags]) if noise else 0.0, residual)
        if residual <= EXACT:
            break
    assert best is not None
    return best


def _fit(evaluations: list[_Evaluation], prediction: str, remembered: _Remembered, forgotten: frozenset[int]) -> _Fit:
    rows: list[_Row] = []
    history: list[Vector] = []
    for k, evaluation in enumerate(evaluations):
        p, q = remembered(evaluation, prediction)
        u = p * evaluation.before + q * evaluation.output
        if not np.isfinite(u).all():
            return _Fit(rows, k, float("inf"))
        row = _fit_one(evaluation, u, history, p, q)
        if not row.residual <= TOLERANCE:
            return _Fit(rows, k, row.residual)
        rows.append(row)
        if k not in forgotten:
            history.insert(0, u)
    return _Fit(rows, residual=max(row.residual for row in rows), forgotten=forgotten)


def _fit_forgetting(evaluations: list[_Evaluation], prediction: str, remembered: _Remembered) -> _Fit:
    """Fit, and where the history is too short try to leave out one evaluation: PNDM forgets its second."""
    fit = _fit(evaluations, prediction, remembered, frozenset())
    if fit.failed_at is None:
        return fit
    for skipped in range(max(0, fit.failed_at - HISTORY - 1), fit.failed_at):
        again = _fit(evaluations, prediction, remembered, frozenset({skipped}))
        if again.failed_at is None:
            return again
    return fit


def _best_fit(evaluations: list[_Evaluation], prediction: str) -> _Fit:
    """Over the ways to remember: the first that is right to within diffusers' casts, else the best."""
    best: _Fit | None = None
    for remembered in _REMEMBERED:
        with np.errstate(all="ignore"):
            fit = _fit_forgetting(evaluations, prediction, remembered)
        if best is None or (fit.failed_at is not None, fit.residual) < (best.failed_at is not None, best.residual):
            best = fit
        if best.failed_at is None and best.residual <= CAST:
            break
    assert best is not None
    return best


def compile_trajectory(
    scheduler: Any,
    steps: int,
    sampler: str,
    *,
    schedule: str | None = None,
    strength: float | None = None,
    **step_options: Any,
) -> Trajectory:
    """The table of a diffusers scheduler over `steps` denoising steps.

    With `strength`, above 0 to 1, the table begins at a given picture: with the last int(steps * strength) of the
    steps, as diffusers' image-to-image pipelines do (Meng et al. 2021, SDEdit). `step_options` go to the scheduler's
    `step()` (eta). Raises CompileError, naming the option or the residual, where the scheduler cannot be expressed,
    or where the strength leaves no step. Leaves the scheduler changed.
    """
    _refuse_by_config(scheduler, steps, sampler)
    with _naming_diffusers(scheduler, steps, sampler):
        scheduler.set_timesteps(steps)
        skipped = 0 if strength is None else _skipped(steps, strength)
        begin = skipped * getattr(scheduler, "order", 1)
        if hasattr(scheduler, "set_begin_index"):
            # Else the first timestep is looked up, and found one too late where rounding made the second equal to it.
            scheduler.set_begin_index(begin)
        image_scale, noise_scale = _first_scales(scheduler, strength, begin)
        _integrate_quickly(scheduler)
        evaluations = _run_scheduler(scheduler, begin, step_options)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    fit = _best_fit(evaluations, prediction)
    if fit.failed_at is not None:
        raise CompileError(
            f"{sampler} with {steps} steps is not a linear recurrence over {HISTORY + 1} evaluations "
            f"(residual {fit.residual:.1e}, tolerance {TOLERANCE:.0e}); choose another sampler",
            sampler=sampler,
            steps=steps,
        )
    return Trajectory(
        sampler=sampler,
        steps=steps - skipped,
        schedule=schedule,
        eta=float(step_options.get("eta", 0.0)),
        strength=strength,
        image_scale=image_scale,
        initial_scale=noise_scale,
        **_table(evaluations, prediction, fit, steps - skipped),
    )


def _skipped(steps: int, strength: float) -> int:
    left = min(int(steps * strength), steps)
    if left < 1:
        enough = math.ceil(1000 / steps) / 1000  # rounded up: a third of 3 steps is a step, and 0.333 of them is none
        raise CompileError(
            f"strength {strength:g} of {steps} steps leaves no step to be made; give a strength of {enough:g} at "
            "least, or more steps",
            strength=strength,
            steps=steps,
        )
    return steps - left


def _first_scales(scheduler: Any, strength: float | None, begin: int) -> tuple[float, float]:
    """What a picture's latents and standard noise are multiplied by to give the first x."""
    if strength is None:
        return 0.0, float(scheduler.init_noise_sigma)
    return _noised(scheduler, scheduler.timesteps[begin])


def _noised(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """What `add_noise` multiplies a picture's latents and standard noise by, for the evaluation that is next."""
    axes = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)  # the picture's and the noise's
    scales = scheduler.add_noise(axes[:, :1], axes[:, 1:], timestep[None]).flatten()
    return float(scales[0]), float(scales[1])


def _table(evaluations: list[_Evaluation], prediction: str, fit: _Fit, steps: int) -> dict[str, Any]:
    """The columns of the Trajectory."""
    count = len(evaluations)
    p0, q0 = np.array([_as_sample(evaluation, prediction) for evaluation in evaluations], dtype=np.float64).T
    return {
        "p0": p0,
        "q0": q0,
        "timestep": np.array([evaluation.timestep for evaluation in evaluations]),
        "input_scale": np.array([evaluation.input_scale for evaluation in evaluations]),
        **{name: np.array([getattr(row, name) for row in fit.rows], dtype=np.float64) for name in "pqabc"},
        "kept_image": np.array([evaluation.kept[0] for evaluation in evaluations]),
        "kept_noise": np.array([evaluation.kept[1] for evaluation in evaluations]),
        "remember": np.array([k not in fit.forgotten for k in range(count)]),
        "draws": np.array([len(evaluation.noises) for evaluation in evaluations]),
        "steps_done": np.array([(k + 1) * steps // count for k in range(count)]),
        "residual": fit.residual,
    }
