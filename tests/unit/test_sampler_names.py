"""The names that people know resolve, in any spelling; contradictions and what is not to be had are refused."""

from __future__ import annotations

import pytest

from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.sampling import SAMPLER_NAMES, SAMPLERS, SCHEDULE_NAMES, SCHEDULES, resolve_names

KNOWN = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "dpm++ 2m": ("dpmpp_2m", None),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", None),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 3M": ("dpmpp_3m", None),
    "DPM++ 2M SGM Uniform": ("dpmpp_2m", "sgm_uniform"),
    "Euler": ("euler", None),
    "Euler a": ("euler_ancestral", None),
    "Euler Simple": ("euler", "sgm_uniform"),
    "euler-ancestral": ("euler_ancestral", None),
    "UniPC": ("unipc", None),
    "uni_pc": ("unipc", None),
    "DDIM": ("ddim", None),
    "DDPM": ("ddpm", None),
    "DPM2": ("dpm2", None),
    "DPM2 a": ("dpm2_ancestral", None),
    "DPM2 a Karras": ("dpm2_ancestral", "karras"),
    "dpm_2_ancestral": ("dpm2_ancestral", None),
    "LMS Karras": ("lms", "karras"),
    "Heun": ("heun", None),
    "Heun beta": ("heun", "beta"),
    "PLMS": ("pndm", None),
    "LCM": ("lcm", None),
    "TCD": ("tcd", None),
    "DEIS": ("deis", None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_names_that_people_know(name: str) -> None:
    assert resolve_names(name) == KNOWN[name]
    assert resolve_names(name.upper().replace(" ", "_")) == KNOWN[name]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
def test_diffusers_class_names(sampler: object) -> None:
    name = getattr(sampler, "scheduler_class")  # noqa: B009
    resolved, schedule = resolve_names(name)
    assert schedule is None
    assert SAMPLERS[str(resolved)].scheduler_class == name
    assert resolve_names(name.removesuffix("Scheduler")) == (resolved, None)


def test_every_sampler_and_schedule_by_its_own_name() -> None:
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    for sampler in SAMPLER_NAMES:
        assert resolve_names(sampler) == (sampler, None)
        for schedule in SCHEDULE_NAMES:
            assert resolve_names(f"{sampler} {schedule}") == (sampler, schedule)
            assert resolve_names(sampler, schedule.upper()) == (sampler, schedule)
            assert resolve_names(f"{sampler}_{schedule}", schedule) == (sampler, schedule)


def test_nothing_stays_nothing() -> None:
    assert resolve_names(None) == (None, None)
    assert resolve_names("", "") == (None, None)
    assert resolve_names(None, "Karras") == (None, "karras")


def test_two_schedules_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="names the schedule karras, and sigma_schedule is beta") as refused:
        resolve_names("DPM++ 2M Karras", "beta")
    assert refused.value.detail["input"] == "sigma_schedule"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("DPM++ SDE", "dpmpp_2s"),
        ("DPM++ SDE Karras", "dpmpp_2m_sde"),
        ("DPMSolverSDEScheduler", "dpmpp_2m_sde"),
        ("DPM++ 2S a", "dpmpp_2s"),
        ("DPM++ 2S a Karras", "dpmpp_2s"),
        ("DPM++ 3M SDE", "dpmpp_2m_sde"),
        ("DPM fast", "dpmpp_2m"),
        ("DPM adaptive", "dpmpp_2m"),
    ],
)
def test_what_is_known_and_not_to_be_had_is_told(name: str, instead: str) -> None:
    with pytest.raises(UnsupportedError, match=instead):
        resolve_names(name)


@pytest.mark.parametrize("name", ["eulr", "karras", "scheduler", "+", "🙂", "dpmpp_2m karras karras", "x" * 300])
def test_bad_names_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        resolve_names(name)
    assert refused.value.detail["choices"] == SAMPLER_NAMES
    assert len(refused.value.message) < 400


def test_bad_schedules_are_refused_with_the_choices() -> None:
    with pytest.raises(InvalidArgumentError, match="sigma_schedule is 'polyexponential'") as refused:
        resolve_names("euler", "polyexponential")
    assert refused.value.detail["choices"] == SCHEDULE_NAMES
