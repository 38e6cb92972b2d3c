"""The numbers of predicted x0, against what diffusers' schedulers predict on the way, in float64."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve.sampling import SAMPLERS, Trajectory, TrajectoryCompiler, compile_trajectory, make_scheduler
from diffuserve.sampling.matrix import PREDICTIONS, REFERENCE

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

SHAPE = (1, 4, 3, 5)
STEPS = 7
#: Those that keep what they made of the model's outputs, and how they keep it.
KEPT_X0 = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
KEPT_NOISE = ("DEISMultistepScheduler",)
#: diffusers has none of these.
NO_SAMPLE_PREDICTION = ("euler_ancestral", "dpm2", "dpm2_ancestral", "pndm")


def reference(scheduler: Any, output: torch.Tensor, t: Any, x: torch.Tensor, stepped: Any) -> torch.Tensor:
    """x0 as the scheduler itself predicts it in a step, or, where it tells nothing, by its papers' formulas."""
    name = type(scheduler).__name__
    if name in KEPT_X0:
        return scheduler.model_outputs[-1]  # type: ignore[no-any-return]
    if name in KEPT_NOISE:
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index - 1].double())
        return (x - sigma * scheduler.model_outputs[-1]) / alpha  # type: ignore[no-any-return]
    if "pred_original_sample" in stepped:
        return stepped.pred_original_sample  # type: ignore[no-any-return]
    if "denoised" in stepped:
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(int(t))
        return (stepped.denoised - skip * x) / out  # type: ignore[no-any-return]
    product = scheduler.alphas_cumprod[int(t)].double()
    alpha, sigma = product.sqrt(), (1 - product).sqrt()
    return {  # type: ignore[no-any-return]
        "epsilon": (x - sigma * output) / alpha,
        "v_prediction": alpha * x - sigma * output,
        "sample": output,
    }[scheduler.config.prediction_type]


@torch.inference_mode()
def worst(scheduler: Any, table: Trajectory, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest relative difference over a whole trajectory on random outputs."""
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(3)

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    x, differences = draw() * float(scheduler.init_noise_sigma), list[float]()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)
        for k, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            output = draw()
            stepped = scheduler.step(output, t, x, return_dict=True)
            expected = reference(scheduler, output, t, x, stepped)
            error = (table.p0[k] * x + table.q0[k] * output - expected).abs() / max(1.0, float(expected.abs().max()))
            differences.append(float(error.max()))
            x = stepped.prev_sample.double()
    assert k == table.evaluations - 1
    return float(np.max(differences))  # NaN where any is


@pytest.mark.parametrize(
    ("sampler", "prediction", "schedule"),
    [
        (name, prediction, schedule)
        for name, sampler in SAMPLERS.items()
        for prediction in PREDICTIONS
        for schedule in (None, *(("karras",) if "use_karras_sigmas" in sampler.options else ()))
        if prediction != "sample" or name not in NO_SAMPLE_PREDICTION
    ],
)
def test_it_is_what_the_scheduler_predicts(
    sampler: str, prediction: str, schedule: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**REFERENCE, "prediction_type": prediction}
    table = TrajectoryCompiler(config)(sampler, STEPS, schedule)
    assert worst(make_scheduler(config, SAMPLERS[sampler], schedule), table, monkeypatch) < 1e-6


def test_a_first_step_of_nothing_but_noise_predicts_too() -> None:
    """Zero terminal SNR begins at nothing but noise, and v-prediction still says where it goes."""
    config = {**REFERENCE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = make_scheduler({**config, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, None)
    table = compile_trajectory(scheduler, STEPS, "ddim")
    assert (table.p0[0], table.q0[0]) == (pytest.approx(0.0, abs=1e-6), pytest.approx(-1.0))
    assert np.isfinite(table.p0).all()
    assert np.isfinite(table.q0).all()
