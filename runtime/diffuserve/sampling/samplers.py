"""The diffusers schedulers behind the names of samplers and sigma schedules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import diffusers

from diffuserve.errors import UnsupportedError
from diffuserve.sampling.trajectory import CompileError

__all__ = ["SAMPLERS", "SCHEDULES", "Sampler", "check_choice", "make_scheduler", "own_scheduler", "remake_scheduler"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """One sampler: diffusers' class, and the config values that make that class this sampler.

    `unused` are options that the class takes and never reads.
    """

    name: str
    scheduler_class: str
    config: Mapping[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    @property
    def type(self) -> Any:
        return getattr(diffusers, self.scheduler_class)

    @property
    def options(self) -> frozenset[str]:
        """What the class can be configured with."""
        return frozenset(inspect.signature(self.type.__init__).parameters) - self.unused

    @property
    def takes_eta(self) -> bool:
        # As diffusers' pipelines decide whether they hand eta on (prepare_extra_step_kwargs).
        return "eta" in inspect.signature(self.type.step).parameters


_MULTISTEP: Final = "DPMSolverMultistepScheduler"
_OWN_STEPS: Final = frozenset({"timestep_spacing"})  # LCM and TCD take their steps from the distillation's
SAMPLERS: Final = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", "DDIMScheduler"),
        Sampler("ddpm", "DDPMScheduler"),
        Sampler("euler", "EulerDiscreteScheduler"),
        Sampler("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        Sampler("heun", "HeunDiscreteScheduler"),
        Sampler("dpm2", "KDPM2DiscreteScheduler"),
        Sampler("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler"),
        Sampler("lms", "LMSDiscreteScheduler"),
        Sampler("pndm", "PNDMScheduler"),
        Sampler("dpmpp_2m", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        Sampler("dpmpp_3m", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
        Sampler("dpmpp_2m_sde", _MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
        Sampler("dpmpp_2s", "DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        Sampler("unipc", "UniPCMultistepScheduler"),
        Sampler("deis", "DEISMultistepScheduler"),
        Sampler("lcm", "LCMScheduler", unused=_OWN_STEPS),
        Sampler("tcd", "TCDScheduler", unused=_OWN_STEPS),
    )
}

_NO_SIGMAS: Final = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
#: The config values of each schedule, the one that it cannot do without first: diffusers' documentation,
#: "Noise schedules and schedule types".
SCHEDULES: Final[dict[str, dict[str, Any]]] = {
    "normal": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def own_scheduler(config: Mapping[str, Any]) -> Any:
    """The checkpoint's own scheduler, of its scheduler_config.json."""
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def make_scheduler(config: Mapping[str, Any], sampler: Sampler | None, schedule: str | None = None) -> Any:
    """A fresh diffusers scheduler with the checkpoint's own config, of the class that the sampler names.

    `config` is the checkpoint's scheduler_config.json; None as the sampler means the checkpoint's own class, None as
    the schedule what its config says.
    """
    own = own_scheduler(config)
    return own if sampler is None else remake_scheduler(own, sampler, schedule)


def remake_scheduler(own: Any, sampler: Sampler, schedule: str | None = None) -> Any:
    """The sampler's scheduler from the checkpoint's own, exactly as a pipeline's `from_config(pipe.scheduler.config)`.

    Through the checkpoint's own class, since values that its file leaves out must not travel to the other class as if
    they had been chosen.
    """
    chosen = {} if schedule is None else {**_NO_SIGMAS, **SCHEDULES[schedule]}
    return _quickly_made(sampler.type, own.config, {**sampler.config, **chosen})


def _quickly_made(scheduler_class: Any, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """`from_config`, for classes that lay out all training steps when they are made: that takes KDPM2 0.4 s.

    What they lay out is thrown away by the `set_timesteps` that follows, so here they lay out two steps.
    """

    def set_two(self: Any, *_: Any, **__: Any) -> None:
        scheduler_class.set_timesteps(self, 2)

    taught = type(scheduler_class.__name__, (scheduler_class,), {"set_timesteps": set_two})
    scheduler = taught.from_config(config, **options)  # type: ignore[attr-defined]
    scheduler.__class__ = scheduler_class
    return scheduler


def check_choice(own_config: Mapping[str, Any], sampler: Sampler, schedule: str | None, eta: float) -> None:
    """Refuse what diffusers' class would pass over in silence. Raises UnsupportedError with the remedy."""
    needed = next(iter(SCHEDULES[schedule]), None) if schedule else None
    if needed is not None and needed not in sampler.options:
        able = [one.name for one in SAMPLERS.values() if needed in one.options]
        raise CompileError(
            f"diffusers' {sampler.scheduler_class} takes no {needed}, so {sampler.name} has no schedule {schedule}; "
            f"leave sigma_schedule out, or use {', '.join(able)}",
            sampler=sampler.name,
            sigma_schedule=schedule,
        )
    if eta and not sampler.takes_eta:
        able = [one.name for one in SAMPLERS.values() if one.takes_eta]
        raise UnsupportedError(
            f"eta is {eta}, and {sampler.name} takes none; leave it out, or use {' or '.join(able)}",
            input="eta",
            value=eta,
        )
    if own_config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in sampler.options:
        able = [one.name for one in SAMPLERS.values() if "rescale_betas_zero_snr" in one.options]
        raise CompileError(
            f"the checkpoint's noise goes to zero terminal SNR, which diffusers' {sampler.scheduler_class} does not "
            f"know; use {', '.join(able)}",
            sampler=sampler.name,
            option="rescale_betas_zero_snr",
        )
