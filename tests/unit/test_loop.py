"""The loop goes on, and every image hears of its end, whatever is raised on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from diffuserve.components import InProcessRunner
from diffuserve.engine import (
    HIDDEN_STATES,
    DenoiseLoop,
    Group,
    LatentPool,
    LoopCheckpoint,
    StepCosts,
    StepPolicy,
    Track,
)
from diffuserve.errors import ComponentFailedError
from diffuserve.sampling import TrajectoryCompiler
from diffuserve.sampling.matrix import REFERENCE
from unit.fakes import component

COMPILER = TrajectoryCompiler(REFERENCE)
Unet = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def no_output(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"model_output": torch.zeros_like(inputs["sample"])}


class Image:
    """A track that keeps what it hears."""

    def __init__(self, on_suspend: Callable[[], None] = lambda: None) -> None:
        self.heard: list[str | BaseException] = []
        self.has_ended = threading.Event()

        def suspend(latents: torch.Tensor, history: torch.Tensor) -> None:
            on_suspend()
            self._hear("suspended")

        self.track = Track(
            group=Group("any", 48, 64),
            trajectory=COMPILER("ddim", 3),
            guidance_scale=1.0,
            latents=torch.ones(4, 6, 8),
            conditioning={HIDDEN_STATES: torch.zeros(1, 3, 1)},
            generator=torch.Generator(),
            on_suspend=suspend,
            on_error=self._hear,
            on_latents=lambda latents: self._hear("latents"),
        )

    def _hear(self, what: str | BaseException) -> None:
        self.heard.append(what)
        self.has_ended.set()

    def ended(self) -> list[str | BaseException]:
        assert self.has_ended.wait(10), "nothing was heard"
        return self.heard


@pytest.fixture
def start() -> Iterator[Callable[..., DenoiseLoop]]:
    loops: list[DenoiseLoop] = []

    def start(unet: Unet = no_output) -> DenoiseLoop:
        policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
        runner, checkpoint = InProcessRunner({"unet": unet}), LoopCheckpoint(component("unet"))
        loops.append(DenoiseLoop(runner, policy, lambda name: checkpoint))
        return loops[-1]

    yield start
    for loop in loops:
        loop.close()


def test_an_image_that_cannot_be_handed_over_hears_of_it(start: Callable[..., DenoiseLoop]) -> None:
    def fail() -> None:
        raise MemoryError("no room to pack it")

    loop, images = start(), [Image(fail), Image()]
    loop.suspend()
    loop.join([image.track for image in images])
    (error,) = images[0].ended()
    assert isinstance(error, MemoryError)
    assert images[1].ended() == ["suspended"]


def test_images_leave_although_there_is_no_memory_for_what_they_became(
    start: Callable[..., DenoiseLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    fails = True

    def unet(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if fails:
            monkeypatch.setattr(LatentPool, "state", no_memory)
            raise MemoryError
        return no_output(inputs)

    loop, stepped, finished, other = start(unet), Image(), Image(), Image()
    loop.join([stepped.track])
    (error,) = stepped.ended()
    assert isinstance(error, ComponentFailedError)
    fails = False
    loop.join([finished.track])
    (error,) = finished.ended()
    assert isinstance(error, MemoryError)
    monkeypatch.undo()
    loop.join([other.track])
    assert other.ended() == ["latents"]
