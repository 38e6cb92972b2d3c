"""One image on its way through the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from diffuserve.engine.control import Control
from diffuserve.engine.costs import Group
from diffuserve.engine.forecast import Demand
from diffuserve.engine.masked import Masked
from diffuserve.engine.policy import Candidate
from diffuserve.lora.choice import LoraKey
from diffuserve.lora.packing import Adapter
from diffuserve.sampling import Trajectory
from diffuserve.spec import UNET

__all__ = ["HIDDEN_STATES", "Track"]

HIDDEN_STATES: Final = "encoder_hidden_states"

_NOTHING: Callable[..., None] = lambda *_: None  # noqa: E731 - a default for callbacks that a test leaves out


@dataclass(eq=False, slots=True, kw_only=True)
class Track:
    """One image's state, as it joins: the loop moves its latents into a pool slot and counts its evaluations.

    latents              [C, h, w] float32, already scaled by the trajectory's initial_scale
    conditioning         the UNet's other inputs by name, each [rows, ...]: the prompt's row, then, with guidance, the
                         negative prompt's. `encoder_hidden_states` [rows, tokens, D] is always there
    generator            the source of fresh noise, on the CPU; the one that drew the first latents
    adapter              its LoRAs, or None; it is let go of when the image leaves the loop
    chunks               how many windows of a text encoder its tokens are
    history              [n, C, h, w] float32, the u of evaluations before the trajectory's first, the newest first:
                         of an image that was begun elsewhere
    steps_before         denoising steps that were complete then
    masked               of an image with a mask
    control              of an image with a picture for the UNet's ControlNet
    deadline             of the loop's clock, in seconds, or None
    on_start()           when its first UNet call begins
    on_step(done)        whenever a denoising step is complete, with their number
    predict_every        steps from one prediction to the next, 0 for none
    on_predicted(done, latents)     after such a step: the latents [C, h, w] float32 that the model predicts by then
    on_latents(latents)  once, with the final latents [C, h, w] float32
    on_error(error)      once, instead
    on_suspend(latents, history)    once, instead: what it had become when the loop was told to let go of it
    is_cancelled()       asked before each step
    """

    group: Group
    trajectory: Trajectory
    guidance_scale: float
    latents: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    generator: torch.Generator
    adapter: Adapter | None = None
    guidance_rescale: float = 0.0
    chunks: int = 1
    history: torch.Tensor | None = None
    steps_before: int = 0
    masked: Masked | None = None
    control: Control | None = None
    predict_every: int = 0
    priority: int = 0
    tag: str = ""
    deadline: float | None = None
    trace: object | None = None
    on_latents: Callable[[torch.Tensor], None] = _NOTHING
    on_error: Callable[[BaseException], None] = _NOTHING
    on_suspend: Callable[[torch.Tensor, torch.Tensor], None] = _NOTHING
    on_start: Callable[[], None] = _NOTHING
    on_step: Callable[[int], None] = _NOTHING
    on_predicted: Callable[[int, torch.Tensor], None] = _NOTHING
    is_cancelled: Callable[[], bool] = lambda: False
    rows: int = field(init=False)
    coefficients: torch.Tensor = field(init=False)
    predicted: torch.Tensor | None = None
    slot: int = -1
    evaluation: int = 0
    joined: int = 0
    joined_at_step: int = 0
    joined_at: float = 0.0
    started_at: float = 0.0
    waiting_since: float = 0.0

    def __post_init__(self) -> None:
        self.rows = len(self.conditioning[HIDDEN_STATES])
        self.coefficients = torch.from_numpy(self.trajectory.coefficients())

    @property
    def is_done(self) -> bool:
        return self.evaluation == self.trajectory.evaluations

    @property
    def remaining(self) -> int:
        return self.trajectory.evaluations - self.evaluation

    def steps_done(self, evaluations: int) -> int:
        """How many denoising steps are complete after that many evaluations."""
        return int(self.trajectory.steps_done[evaluations - 1]) if evaluations else self.steps_before

    def predicts(self) -> bool:
        """Whether the evaluation that comes completes a step whose prediction is wanted."""
        if not self.predict_every:
            return False
        done = self.steps_done(self.evaluation + 1)
        return done > self.steps_done(self.evaluation) and done % self.predict_every == 0

    @property
    def adapter_key(self) -> LoraKey:
        """What tells the adapter of its UNet calls from others; empty for none."""
        return self.adapter.key if self.adapter and UNET in self.adapter.vectors else ()

    def candidate(self) -> Candidate:
        """What the policy sees of it."""
        return Candidate(
            key=self.joined,
            group=self.group,
            rows=self.rows,
            length=self.trajectory.evaluations,
            remaining=self.remaining,
            joined=self.joined,
            waiting_since=self.waiting_since,
            priority=self.priority,
            tag=self.tag,
            deadline=self.deadline,
            adapter=self.adapter_key,
        )

    def demand(self) -> Demand:
        """What forecasts see of it."""
        length = self.trajectory.evaluations
        return Demand(
            self.group, self.rows, self.remaining, self.priority, self.chunks, length=length, adapter=self.adapter_key
        )
