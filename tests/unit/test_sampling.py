"""Compiled trajectories against diffusers' own schedulers, run step by step in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve.engine import LatentPool, Track
from diffuserve.errors import UnsupportedError
from diffuserve.sampling import SAMPLERS, CompileError, TrajectoryCompiler, compile_trajectory, make_scheduler

SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
STEPS = (1, 2, 4, 10, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SHAPE = (4, 3, 5)
# diffusers' PNDM knows no sample prediction.
CASES = [case for case in itertools.product(SAMPLERS, PREDICTIONS, STEPS) if case[:2] != ("pndm", "sample")]


def _outputs(case: tuple[str, str, int], evaluations: int) -> torch.Tensor:

    return torch.randn(
        (evaluations, *SHAPE), generator=torch.Generator().manual_seed(CASES.index(case)), dtype=torch.float64
    )


def _by_diffusers(case: tuple[str, str, int], first: torch.Tensor) -> torch.Tensor:
    sampler, prediction, steps = case
    scheduler = make_scheduler({**SD15, "prediction_type": prediction}, SAMPLERS[sampler])
    scheduler.set_timesteps(steps)
    x = first[None].double() * float(scheduler.init_noise_sigma)
    outputs = _outputs(case, len(scheduler.timesteps))
    for k, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(outputs[k][None], t, x, return_dict=False)[0].double()
    result: torch.Tensor = x[0]
    return result


def test_every_sampler_agrees_with_diffusers_mixed_in_one_batch() -> None:
    compilers = {one: TrajectoryCompiler({**SD15, "prediction_type": one}) for one in PREDICTIONS}
    pool, tracks, firsts = LatentPool(), {}, {}
    for number, case in enumerate(CASES):
        sampler, prediction, steps = case
        trajectory = compilers[prediction](sampler, steps)
        generator = torch.Generator().manual_seed(1000 + number)
        firsts[case] = torch.randn(SHAPE, generator=generator)
        tracks[case] = Track(
            group=("any", 3, 5),
            trajectory=trajectory,
            guidance_scale=1.0,
            latents=firsts[case] * trajectory.initial_scale,
            hidden_states=torch.zeros(1, 2, 2),
            generator=generator,
        )
        pool.join(tracks[case])

    while running := {case: track for case, track in tracks.items() if not track.is_done}:

        def denoise(sample: torch.Tensor, timestep: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            rows = [_outputs(case, track.trajectory.evaluations)[track.evaluation] for case, track in running.items()]
            assert len(rows) == len(sample) == len(timestep) == len(hidden)
            return torch.stack(rows).float()

        pool.step(list(running.values()), denoise)

    for case, track in tracks.items():
        expected = _by_diffusers(case, firsts[case])
        error = (pool.leave(track).double() - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"{case}: relative error {error:.1e}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_unet_is_told_what_diffusers_tells_it(sampler: str) -> None:
    scheduler = make_scheduler(SD15, SAMPLERS[sampler])
    scheduler.set_timesteps(7)
    trajectory = TrajectoryCompiler(SD15)(sampler, 7)
    assert np.allclose(trajectory.timestep, [float(t) for t in scheduler.timesteps])
    for k, t in enumerate(scheduler.timesteps):
        expected = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))
        assert trajectory.input_scale[k] == pytest.approx(expected, rel=1e-6)
        scheduler.step(torch.zeros(1, 1, 1, 1), t, torch.ones(1, 1, 1, 1))
    assert trajectory.steps_done[-1] == 7


def test_the_checkpoints_own_sampler_is_the_default() -> None:
    assert TrajectoryCompiler(SD15)(None, 5).sampler == "pndm"


def test_pndm_forgets_its_second_evaluation() -> None:
    trajectory = TrajectoryCompiler(SD15)("pndm", 10)
    assert trajectory.evaluations == 11
    assert list(np.flatnonzero(~trajectory.remember)) == [1]


def test_tables_are_cached() -> None:
    compiler = TrajectoryCompiler(SD15)
    assert compiler("ddim", 20) is compiler("ddim", 20)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_what_is_not_linear_is_refused_by_name(option: str) -> None:
    scheduler = make_scheduler({**SD15, "_class_name": "DDIMScheduler", option: True}, None)
    with pytest.raises(CompileError, match=option):
        compile_trajectory(scheduler, 5, "ddim")


def test_a_scheduler_that_no_history_explains_is_refused_with_its_residual() -> None:
    class LongMemory:
        """Every step weighs all outputs so far anew, which no short history can."""

        timesteps = torch.arange(900, 0, -100)
        init_noise_sigma = 1.0
        alphas_cumprod = torch.linspace(0.99, 0.01, 1000)

        def __init__(self) -> None:
            self.config: dict[str, Any] = {}
            self.outputs: list[torch.Tensor] = []

        def set_timesteps(self, steps: int) -> None: ...

        def scale_model_input(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

        def step(self, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, return_dict: bool) -> tuple[Any, ...]:
            self.outputs.append(output)
            generator = torch.Generator().manual_seed(int(t))
            weights = torch.randn(len(self.outputs), generator=generator, dtype=torch.float64)
            return (x + sum(w * one for w, one in zip(weights, self.outputs, strict=True)),)

    with pytest.raises(CompileError, match="residual"):
        compile_trajectory(LongMemory(), 9, "long_memory")


def test_a_checkpoint_whose_own_scheduler_has_no_name_needs_one_given() -> None:
    compiler = TrajectoryCompiler({**SD15, "_class_name": "DEISMultistepScheduler"})
    with pytest.raises(UnsupportedError, match="give a sampler"):
        compiler(None, 5)
    assert compiler("ddim", 5).sampler == "ddim"
