"""How trajectories are compiled, cached and refused; test_samplers.py compares them with diffusers."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.request import MAX_STEPS
from diffuserve.sampling import SAMPLERS, CompileError, TrajectoryCompiler, compile_trajectory, make_scheduler
from diffuserve.sampling.compile import _skipped
from diffuserve.sampling.matrix import REFERENCE as SD15


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


def test_tables_may_be_asked_for_from_several_threads() -> None:
    asked = [(sampler, steps) for steps in (3, 8) for sampler in ("ddpm", "dpmpp_2m_sde", "euler_ancestral", "lcm")] * 3
    compiler = TrajectoryCompiler(SD15)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: compiler(*one), asked))
    for (sampler, steps), table in zip(asked, made, strict=True):
        alone = TrajectoryCompiler(SD15)(sampler, steps)
        assert np.array_equal(table.coefficients(), alone.coefficients())
        assert np.array_equal(table.draws, alone.draws)


def test_the_strength_that_a_refusal_names_is_enough() -> None:
    for steps in range(1, MAX_STEPS + 1):
        with pytest.raises(CompileError) as refused:
            _skipped(steps, 0.9 / steps)
        told = re.search(r"a strength of (\S+) at least", refused.value.message)
        assert told is not None
        assert _skipped(steps, float(told[1])) == steps - 1


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

        def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + noise

    with pytest.raises(CompileError, match="residual"):
        compile_trajectory(LongMemory(), 9, "long_memory")


def test_a_checkpoint_whose_own_scheduler_has_no_name_needs_one_given() -> None:
    compiler = TrajectoryCompiler({**SD15, "_class_name": "SASolverScheduler"})
    with pytest.raises(UnsupportedError, match="give a sampler"):
        compiler(None, 5)
    assert compiler("ddim", 5).sampler == "ddim"


@pytest.mark.parametrize(
    ("config", "default"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_3m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "unipc"),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "deis"),
    ],
)
def test_the_default_is_named_by_class_and_config(config: dict[str, Any], default: str) -> None:
    compiler = TrajectoryCompiler({**SD15, **config})
    assert compiler.default == default
    assert compiler(None, 12).residual <= 1e-6


def test_no_schedule_is_the_checkpoints_own() -> None:
    compiler = TrajectoryCompiler({**SD15, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True})
    own, karras, normal = (compiler("euler", 8, schedule) for schedule in (None, "karras", "normal"))
    assert np.array_equal(own.timestep, karras.timestep)
    assert not np.array_equal(own.timestep, normal.timestep)
    assert (own.schedule, karras.schedule) == (None, "karras")


def test_names_are_resolved_before_tables_are_cached() -> None:
    compiler = TrajectoryCompiler(SD15)
    assert compiler("DPM++ 2M Karras", 5) is compiler("dpmpp_2m", 5, "karras")
    with pytest.raises(InvalidArgumentError, match="dpmpp_3m") as refused:
        compiler("dpmpp_9m", 5)
    assert "unipc" in refused.value.detail["choices"]


@pytest.mark.parametrize("sampler", [name for name, one in SAMPLERS.items() if not one.takes_eta])
def test_eta_is_never_ignored(sampler: str) -> None:
    with pytest.raises(UnsupportedError, match="use ddim or tcd"):
        TrajectoryCompiler(SD15)(sampler, 5, eta=0.5)


def test_a_refusal_is_kept_and_told_anew() -> None:
    compiler, refusals = TrajectoryCompiler(SD15), list[CompileError]()
    for _ in range(2):
        with pytest.raises(CompileError, match="at most 50") as refused:
            compiler("lcm", 51)
        refusals.append(refused.value)
    assert refusals[0] is not refusals[1]
    assert refusals[0].detail == {"sampler": "lcm", "steps": 51, "maximum": 50}


def test_runge_kutta_steps_are_refused_by_name() -> None:
    with pytest.raises(CompileError, match="skip_prk_steps"):
        TrajectoryCompiler({**SD15, "skip_prk_steps": False})("pndm", 10)


def test_zero_terminal_snr_is_never_ignored() -> None:
    compiler = TrajectoryCompiler({**SD15, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    with pytest.raises(CompileError, match="HeunDiscreteScheduler does not know; use ddim"):
        compiler("heun", 10)


def test_a_division_by_zero_in_diffusers_is_told() -> None:
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(CompileError, match="divides by zero at step 1 of 10"):
        TrajectoryCompiler({**SD15, **config})("ddim", 10)


def test_a_config_that_diffusers_refuses_is_told() -> None:
    compiler = TrajectoryCompiler({**SD15, "timestep_spacing": "logarithmic"})
    with pytest.raises(CompileError, match="logarithmic"):
        compiler("ddim", 10)


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpm2_ancestral", "lms"])
def test_schedulers_made_quickly_are_diffusers_own(sampler: str) -> None:
    quick = make_scheduler(SD15, SAMPLERS[sampler], "karras")
    plain = SAMPLERS[sampler].type.from_config(make_scheduler(SD15, None).config, use_karras_sigmas=True)
    assert type(quick) is type(plain)
    for scheduler in (quick, plain):
        scheduler.set_timesteps(9)
    assert torch.equal(quick.timesteps, plain.timesteps)
    assert torch.equal(quick.sigmas, plain.sigmas)
    left_out = {"_use_default_values", "use_exponential_sigmas", "use_beta_sigmas"}
    assert {k: v for k, v in quick.config.items() if k not in left_out} == {
        k: v for k, v in plain.config.items() if k not in left_out
    }
