"""The names by which people know samplers and sigma schedules, in ComfyUI, A1111, k-diffusion and diffusers.

The mapping of A1111's names to diffusers is that of diffusers' documentation, "api/schedulers/overview".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from diffuserve.errors import InvalidArgumentError, UnsupportedError

__all__ = ["SAMPLER_NAMES", "SCHEDULE_NAMES", "names_of", "resolve_names"]

SAMPLER_NAMES: Final = (
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "lms",
    "pndm",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "unipc",
    "deis",
    "lcm",
    "tcd",
)
SCHEDULE_NAMES: Final = ("normal", "karras", "exponential", "beta", "sgm_uniform")

_ALIASES: Final = {
    "euler_ancestral": ("euler a", "EulerAncestralDiscrete"),
    "euler": ("EulerDiscrete",),
    "heun": ("HeunDiscrete",),
    "dpm2": ("KDPM2Discrete",),
    "dpm2_ancestral": ("dpm2 a", "KDPM2AncestralDiscrete"),
    "lms": ("LMSDiscrete",),
    "pndm": ("plms",),
    "dpmpp_2m": ("DPMSolverMultistep",),
    "dpmpp_2s": ("DPMSolverSinglestep",),
    "unipc": ("UniPCMultistep",),
    "deis": ("DEISMultistep",),
}
# diffusers' documentation gives both the same setting.
_SCHEDULE_ALIASES: Final = {"sgm_uniform": ("simple",)}
# Known, and not to be had: a near name would make another picture, so it is said instead.
_REFUSED: Final = {
    ("dpmpp_sde", "DPMSolverSDE"): (
        "takes fresh noise in the middle of each step, which its second half uses again",
        "dpmpp_2m_sde, or dpmpp_2s for the same method without noise",
    ),
    ("dpmpp_2s_ancestral", "dpmpp_2s a"): ("is not in diffusers", "dpmpp_2s, the same method without fresh noise"),
    ("dpmpp_3m_sde",): ("has no reference in diffusers", "dpmpp_2m_sde or dpmpp_3m"),
    ("dpmpp_2m_sde_heun",): ("has no reference in diffusers", "dpmpp_2m_sde"),
    ("dpm_fast",): ("is not in diffusers", "dpmpp_2m"),
    ("dpm_adaptive",): ("chooses its steps from the picture, and is not in diffusers", "dpmpp_2m"),
}


def _key(name: str) -> str:
    """The name without case, spaces, underscores and hyphens, "++" as "pp", and diffusers' last word left out."""
    key = re.sub(r"[\s_\-]+", "", name.lower()).replace("+", "p")
    return key.removesuffix("scheduler") or key


def _keys(names: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {_key(spelling): name for name in names for spelling in (name, *aliases.get(name, ()))}


_SAMPLER_OF_KEY: Final = _keys(SAMPLER_NAMES, _ALIASES)
_SCHEDULE_OF_KEY: Final = _keys(SCHEDULE_NAMES, _SCHEDULE_ALIASES)
_REFUSED_KEYS: Final = {_key(one): (names[0], *why) for names, why in _REFUSED.items() for one in names}


def resolve_names(sampler: str | None, schedule: str | None = None) -> tuple[str | None, str | None]:
    """The sampler's and the schedule's names here; None, or nothing, stays None: the checkpoint's own.

    A sampler's name may carry its schedule, as in "DPM++ 2M Karras". Raises InvalidArgumentError for a name that is
    not known and for two schedules that contradict each other, UnsupportedError for a sampler that is known and not
    to be had.
    """
    asked = _schedule_name(schedule) if schedule else None
    if not sampler:
        return None, asked
    key = _key(sampler)
    name, suffix = _sampler_name(key), None
    if name is None:
        for ending, one in _SCHEDULE_OF_KEY.items():
            if key.endswith(ending) and (name := _sampler_name(key.removesuffix(ending))) is not None:
                suffix = one
                break
        else:
            _unknown("sampler", sampler, SAMPLER_NAMES)
    if suffix is not None and asked not in (None, suffix):
        raise InvalidArgumentError(
            f"sampler {sampler[:64]!r} names the schedule {suffix}, and sigma_schedule is {asked}; give one of them",
            input="sigma_schedule",
            value=asked,
        )
    return name, suffix or asked


def names_of(sampler: str) -> tuple[str, ...]:
    """Other names of the sampler, beside its own in any spelling."""
    return tuple(_ALIASES.get(sampler, ()))


def _sampler_name(key: str) -> str | None:
    if key in _REFUSED_KEYS:
        name, reason, instead = _REFUSED_KEYS[key]
        raise UnsupportedError(f"the sampler {name} {reason}; use {instead}", input="sampler", value=name)
    return _SAMPLER_OF_KEY.get(key)


def _schedule_name(schedule: str) -> str:
    return _SCHEDULE_OF_KEY.get(_key(schedule)) or _unknown("sigma_schedule", schedule, SCHEDULE_NAMES)


def _unknown(field: str, value: str, choices: Sequence[str]) -> NoReturn:
    raise InvalidArgumentError(
        f"{field} is {value[:64]!r}, and must be one of {', '.join(choices)}",
        input=field,
        value=value[:64],
        choices=tuple(choices),
    )
