"""The loop's own cost: the time between two UNet calls of the real service over engines that compute nothing."""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffuserve.components import InProcessRunner
from diffuserve.errors import DiffuserveError
from diffuserve.manifest import Deployment, Manifest
from diffuserve.request import Event, GenerateRequest
from diffuserve.service import DiffusionService
from diffuserve.spec import LATENTS, PIXELS, TEXT_ENCODER, UNET, VAE_DECODER
from measure.tables import at_most, table

__all__ = ["LoopCost", "loop_cost_table", "run_loop_cost"]

STEP_TARGET = at_most(2, " ms")
ROW_TARGET = at_most(0.3, " ms")
UNET_SECONDS = 0.003
PROFILE_LINES = 15
Tensors = Mapping[str, torch.Tensor]


class IdleEngines:
    """Components that answer with zeros; the UNet notes its rows and when it was entered and left.

    The UNet takes the same time for any number of rows, so that the policy wants as many as it can get. Its first
    call after `arm` waits for `gate`, so that all requests of a measurement join before the second.
    """

    def __init__(self, manifest: Manifest, profile: cProfile.Profile | None, profiled_calls: int) -> None:
        self.manifest, self.prompts = manifest, 0
        self.gate, self._armed = threading.Event(), False
        self.calls: list[tuple[int, float, float]] = []
        self._profile, self._profiled_calls = profile, profiled_calls

    def runner(self) -> InProcessRunner:
        functions = {TEXT_ENCODER: self._text, UNET: self._unet, VAE_DECODER: self._decode}
        return InProcessRunner({self.manifest.components[name].model: one for name, one in functions.items()})

    def arm(self) -> None:
        """Begin to measure, once the calls that a new service makes to learn their costs are over."""
        before = -1
        while before != len(self.calls):
            before = len(self.calls)
            time.sleep(0.3)
        self.calls.clear()
        self._armed = True

    def gaps(self, rows: int) -> list[float]:
        """Seconds from the end of a call to the begin of the next, where both have so many rows."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        return [entered - left for (before, _, left), (after, entered, _) in pairs if before == after == rows]

    def _text(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        ids = inputs["input_ids"]
        self.prompts += len(ids)
        width = next(one for one in self.manifest.components[UNET].inputs if one.name == "encoder_hidden_states")
        return {"hidden_states": torch.zeros(*ids.shape, int(width.shape[-1]))}

    def _unet(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        entered = time.perf_counter()
        if self._armed and not self.calls:
            self.gate.wait()
        if self._profile and self._armed and len(self.calls) == 1:
            self._profile.enable()  # on the thread that calls, which is the loop's
        if self._profile and self._armed and len(self.calls) == self._profiled_calls:
            self._profile.disable()
        time.sleep(UNET_SECONDS)
        output = {"model_output": torch.zeros_like(inputs["sample"])}
        self.calls.append((len(inputs["sample"]), entered, time.perf_counter()))
        return output

    def _decode(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        rows, _, height, width = inputs[LATENTS].shape
        scale = self.manifest.latent_scale
        return {PIXELS: torch.zeros(rows, 3, height * scale, width * scale)}


class _Answer:
    """A reply that can be waited for."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: DiffuserveError | None = None

    def send(self, event: Event, *, final: bool) -> None:  # noqa: ARG002 - the port's signature
        if final:
            self._ended.set()

    def fail(self, error: DiffuserveError) -> None:
        self._error = error
        self._ended.set()

    def is_cancelled(self) -> bool:
        return False

    def wait(self) -> None:
        if not self._ended.wait(120):
            raise TimeoutError("a request of the loop's measurement never ended")
        if self._error:
            raise self._error


@dataclass(frozen=True)
class LoopCost:
    """Median milliseconds between two UNet calls, by what shared them."""

    one_request: float
    guided: float
    unguided: float
    rows: int
    profile: str


def run_loop_cost(deployment: Path, steps: int, rows: int = 32) -> LoopCost:
    """One guided request; then so many rows of guided requests, and of unguided ones, which are twice as many."""
    loaded = Deployment.load(deployment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in Triton
    try:
        return LoopCost(
            one_request=_gap_ms(loaded, 1, 7.5, steps),
            guided=_gap_ms(loaded, rows // 2, 7.5, steps),
            unguided=_gap_ms(loaded, rows, 1.0, steps),
            rows=rows,
            profile=_profiled(loaded, rows, 1.0, steps),
        )
    finally:
        torch.set_num_threads(threads)


def _gap_ms(deployment: Deployment, requests: int, guidance: float, steps: int) -> float:
    engines = _run(deployment, requests, guidance, steps)
    return 1000 * statistics.median(engines.gaps(requests * (2 if guidance > 1 else 1)))


def _profiled(deployment: Deployment, requests: int, guidance: float, steps: int) -> str:
    profile = cProfile.Profile()
    _run(deployment, requests, guidance, steps, profile)
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    stats.strip_dirs().sort_stats("tottime").print_stats(PROFILE_LINES)
    head = f"{steps - 2} steps of {requests} requests, profiled (which slows Python down), by own time:\n"
    return head + "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def _run(
    deployment: Deployment, requests: int, guidance: float, steps: int, profile: cProfile.Profile | None = None
) -> IdleEngines:
    """All the requests, of one length, through a service of their own."""
    engines = IdleEngines(deployment.manifest(deployment.checkpoints[0]), profile, steps - 1)
    service = DiffusionService(deployment, engines.runner())
    engines.arm()
    answers = [_Answer() for _ in range(requests)]
    for number, answer in enumerate(answers):
        sampler = ("ddim", "euler", "dpmpp_2m")[number % 3]
        first = GenerateRequest(prompt="", steps=steps, guidance_scale=guidance)
        service.submit(replace(first, prompt=f"number {number}", sampler=sampler, seed=number), answer)
    while engines.prompts < requests:
        time.sleep(0.01)
    time.sleep(0.2)  # the last one's first latents
    engines.gate.set()
    for answer in answers:
        answer.wait()
    service.close()
    return engines


def loop_cost_table(cost: LoopCost) -> str:
    rows = [
        ("one guided request, ms a step", f"{cost.one_request:.2f}", *STEP_TARGET.cells(cost.one_request)),
        *(
            (
                f"{cost.rows} rows of {count} {kind} requests, ms a row",
                f"{step / cost.rows:.3f}",
                *ROW_TARGET.cells(step / cost.rows),
            )
            for kind, count, step in (
                ("guided", cost.rows // 2, cost.guided),
                ("unguided", cost.rows, cost.unguided),
            )
        ),
    ]
    return table(("between two UNet calls", "measured", "target", "met"), rows)
