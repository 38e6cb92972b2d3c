"""What the peers and the measurements agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from diffuserve.request import GenerateRequest

__all__ = ["SCHEDULERS", "Made", "Picture", "Places", "Serve", "open_pipeline"]

SCHEDULERS: Final = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Places:
    """One checkpoint, twice: as diffusers reads it, and as it was exported."""

    checkpoint: Path
    deployment: Path


class Picture(Protocol):
    """What comes back of a request."""

    @property
    def image(self) -> Image.Image: ...

    @property
    def info(self) -> Any: ...


@dataclass(frozen=True)
class Made:
    """A picture that was made in this process; nothing is told of it."""

    image: Image.Image
    info: dict[str, Any] = field(default_factory=dict)


#: A request in, its picture out.
Serve = Callable[[GenerateRequest], Picture]


def open_pipeline(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """diffusers' pipeline in float32, and the schedulers that it may be given."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {name: one.from_config(pipeline.scheduler.config) for name, one in SCHEDULERS.items()}
