"""The names people use for samplers, and the diffusers schedulers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import diffusers

__all__ = ["SAMPLERS", "Sampler", "make_scheduler"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """One sampler: diffusers' class, and the config values that make that class this sampler."""

    name: str
    scheduler_class: str
    config: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: Final = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", "DDIMScheduler"),
        Sampler("euler", "EulerDiscreteScheduler"),
        Sampler("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        Sampler("pndm", "PNDMScheduler"),
    )
}


def make_scheduler(config: Mapping[str, Any], sampler: Sampler | None) -> Any:
    """A fresh diffusers scheduler with the checkpoint's own config, of the class that the sampler names.

    `config` is the checkpoint's scheduler_config.json; None as the sampler means the checkpoint's own class.
    """
    # Through the checkpoint's own class first, exactly as a pipeline's `from_config(pipe.scheduler.config)`:
    # values that its file leaves out must not travel to the other class as if they had been chosen.
    own = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if sampler is None:
        return own
    return getattr(diffusers, sampler.scheduler_class).from_config(own.config, **sampler.config)
