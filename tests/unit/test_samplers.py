"""Every sampler, schedule and prediction type through the pool, against diffusers after each evaluation, in float64."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from diffuserve.engine import Group, LatentPool, Masked, Track
from diffuserve.errors import UnsupportedError
from diffuserve.sampling import SAMPLERS, SCHEDULES, TrajectoryCompiler, make_scheduler
from diffuserve.sampling.matrix import PREDICTIONS, REFERENCE, SPACINGS, cells

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_diffusers")

STEPS = (1, 2, 4, 10, 20, 50)
SHAPE = (4, 3, 5)
NO_SIGMAS = ("ddim", "ddpm", "euler_ancestral", "pndm", "lcm", "tcd")
#: What diffusers does not have, sampler by sampler: the schedules, and whether sample prediction.
REFUSED_SCHEDULES = {
    **{sampler: {"karras", "exponential", "beta"} for sampler in NO_SIGMAS},
    **{sampler: {"karras", "exponential", "beta", "sgm_uniform"} for sampler in ("lcm", "tcd")},
    "dpmpp_2s": {"sgm_uniform"},
}
NO_SAMPLE_PREDICTION = {"euler_ancestral", "dpm2", "dpm2_ancestral", "pndm"}
ZERO_SNR = ("ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "lcm", "tcd")

Options = tuple[tuple[str, Any], ...]


class Case(NamedTuple):
    sampler: str
    schedule: str | None
    prediction: str
    steps: int
    eta: float = 0.0
    options: Options = ()
    strength: float | None = None
    masked: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return {**REFERENCE, "prediction_type": self.prediction, **dict(self.options)}


def _is_refused(sampler: str, schedule: str, prediction: str) -> bool:
    return schedule in REFUSED_SCHEDULES.get(sampler, ()) or (
        prediction == "sample" and sampler in NO_SAMPLE_PREDICTION
    )


def _every_case() -> Iterator[Case]:
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            for prediction in PREDICTIONS:
                if not _is_refused(sampler, schedule, prediction):
                    for steps in STEPS:
                        yield Case(sampler, schedule, prediction, steps)
        for spacing in SPACINGS:
            yield Case(sampler, None, "epsilon", 10, options=(("timestep_spacing", spacing),))
        for strength in (0.3, 0.7, 1.0):
            for steps in (4, 10, 20):
                yield Case(sampler, None, "epsilon", steps, strength=strength)
        yield Case(sampler, "normal", "v_prediction", 20, strength=0.5)
        for strength, steps in ((0.3, 20), (0.7, 11), (1.0, 4), (1.0, 11)):
            yield Case(sampler, None, "epsilon", steps, strength=strength, masked=True)
        for schedule in SCHEDULES:
            if not _is_refused(sampler, schedule, "v_prediction"):
                yield Case(sampler, schedule, "v_prediction", 10, strength=0.6, masked=True)
    for sampler in ("ddim", "tcd"):
        for eta in (0.3, 1.0):
            for steps in (1, 4, 20):
                yield Case(sampler, "normal", "epsilon", steps, eta)
    zero_snr: Options = (("_class_name", "DDIMScheduler"), ("rescale_betas_zero_snr", True))
    for sampler in ZERO_SNR:
        for schedule in SCHEDULES:
            if not _is_refused(sampler, schedule, "v_prediction"):
                for steps in (1, 4, 20):
                    yield Case(sampler, schedule, "v_prediction", steps, options=zero_snr)


CASES = {case: number for number, case in enumerate(_every_case())}


@cache
def _outputs(case: Case, evaluations: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CASES[case])
    return torch.randn((evaluations, *SHAPE), generator=generator, dtype=torch.float64)


@cache
def _image(case: Case) -> torch.Tensor:
    """The latents of a given picture."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10_000 + CASES[case]), dtype=torch.float64)


@cache
def _mask(case: Case) -> torch.Tensor:
    """Where a given picture is made anew."""
    return torch.rand((1, *SHAPE[1:]), generator=torch.Generator().manual_seed(20_000 + CASES[case])) < 0.5


@cache
def _scheduler(sampler: str, schedule: str | None, config: Options) -> Any:
    return make_scheduler(dict(config), SAMPLERS[sampler], schedule)


@torch.inference_mode()
def _by_diffusers(case: Case, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The latents after each evaluation of diffusers' own loop.

    Noise is as its float32 pipelines draw it, so that a generator gives the same.
    """
    scheduler = copy.deepcopy(_scheduler(case.sampler, case.schedule, tuple(case.config.items())))
    scheduler.set_timesteps(case.steps)
    # As StableDiffusionImg2ImgPipeline.get_timesteps.
    strength = 1.0 if case.strength is None else case.strength
    begin = max(case.steps - min(int(case.steps * strength), case.steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(CASES[case])
    first = torch.randn((1, *SHAPE), generator=generator)
    takes = inspect.signature(scheduler.step).parameters
    offered = {"eta": case.eta, "generator": generator}
    options = {name: value for name, value in offered.items() if name in takes}

    def draw(shape: Any, generator: Any = None, **_: Any) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator).double()

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)
        if case.strength is None or (case.masked and case.strength == 1):
            x = first.double() * float(scheduler.init_noise_sigma)
        else:
            x = scheduler.add_noise(_image(case)[None], first.double(), timesteps[:1])
        outputs, latents = _outputs(case, len(timesteps)), []
        for k, t in enumerate(timesteps):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(outputs[k][None], t, x, return_dict=False, **options)[0].double()
            if case.masked:  # as StableDiffusionInpaintPipeline with 4 channels
                given = _image(case)[None]
                if k < len(timesteps) - 1:
                    given = scheduler.add_noise(given, first.double(), torch.tensor([timesteps[k + 1]]))
                x = torch.where(_mask(case), x, given)
            latents.append(x[0])
    return torch.stack(latents)


def _track(case: Case, compiler: TrajectoryCompiler) -> Track:
    strength = None if case.masked and case.strength == 1 else case.strength
    trajectory = compiler(case.sampler, case.steps, case.schedule, case.eta, strength)
    generator = torch.Generator().manual_seed(CASES[case])
    noise, image = torch.randn((1, *SHAPE), generator=generator)[0], _image(case).float()
    return Track(
        group=Group("any", 3, 5),
        trajectory=trajectory,
        guidance_scale=1.0,
        latents=noise * trajectory.initial_scale + image * trajectory.image_scale,
        masked=Masked(_mask(case), image, noise) if case.masked else None,
        conditioning={"encoder_hidden_states": torch.zeros(1, 2, 2)},
        generator=generator,
    )


def test_every_sampler_agrees_with_diffusers_mixed_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {tuple(case.config.items()) for case in CASES}
    compilers = {config: TrajectoryCompiler(dict(config)) for config in configs}
    tracks = {case: _track(case, compilers[tuple(case.config.items())]) for case in CASES}
    pool = LatentPool()
    for track in tracks.values():
        pool.join(track)
    latents: dict[Case, list[torch.Tensor]] = {case: [] for case in CASES}
    while running := {case: track for case, track in tracks.items() if not track.is_done}:

        def denoise(sample: torch.Tensor, timestep: torch.Tensor, told: Any) -> torch.Tensor:
            rows = [_outputs(case, track.trajectory.evaluations)[track.evaluation] for case, track in running.items()]
            assert len(rows) == len(sample) == len(timestep) == len(told["encoder_hidden_states"])
            return torch.stack(rows).float()

        pool.step(list(running.values()), denoise)
        for case, one in zip(running, pool._latents[[track.slot for track in running.values()]], strict=True):
            latents[case].append(one)

    errors = {}
    for case in tracks:
        expected = _by_diffusers(case, monkeypatch)
        off = (torch.stack(latents[case]).double() - expected).abs().amax(dim=(1, 2, 3))
        errors[case] = float((off / expected.abs().amax(dim=(1, 2, 3))).max())
    wrong = {case: error for case, error in errors.items() if not error <= 1e-5}
    assert not wrong, f"{len(wrong)} of {len(errors)} differ: {wrong}"


def test_what_is_refused_does_not_grow() -> None:
    refused = {(cell.sampler, cell.schedule, cell.prediction) for cell in cells() if cell.made is None}
    assert refused == {
        (sampler, schedule, prediction)
        for sampler in SAMPLERS
        for schedule in SCHEDULES
        for prediction in PREDICTIONS
        if _is_refused(sampler, schedule, prediction)
    }


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ZERO_SNR])
def test_zero_terminal_snr_is_refused_where_diffusers_has_none(sampler: str) -> None:
    compiler = TrajectoryCompiler({**REFERENCE, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    with pytest.raises(UnsupportedError, match="zero terminal SNR"):
        compiler(sampler, 10)


def test_strength_decides_how_many_steps_are_left() -> None:
    compiler = TrajectoryCompiler(REFERENCE)
    whole, late = compiler("heun", 20), compiler("heun", 20, strength=0.3)
    assert (late.steps, late.strength, late.evaluations) == (6, 0.3, 11)
    assert late.steps_done.tolist()[-1] == 6
    assert late.timestep.tolist() == whole.timestep.tolist()[-11:]
    assert 0 < late.initial_scale < whole.initial_scale
    assert (whole.strength, whole.image_scale) == (None, 0.0)
    assert compiler("ddim", 20, strength=1.0).image_scale > 0
    with pytest.raises(UnsupportedError, match=r"strength 0\.04 of 20 steps leaves no step .* 0\.05 at least"):
        compiler("ddim", 20, strength=0.04)
