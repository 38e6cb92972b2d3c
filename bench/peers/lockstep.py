"""(b) diffusers' pipeline with a dynamic batcher in front of it.

Requests that agree in steps, sampler and guidance run as one pipeline call: they wait for each other for a short
window, start together and end together. While a call runs, whatever arrives collects for the next ones. This is what
batching servers around diffusers do, and the dynamic batcher of Triton in front of a whole pipeline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from diffuserve.request import GenerateRequest
from peers.common import Made, Places, Serve, open_pipeline

__all__ = ["lockstep"]

WINDOW_SECONDS: Final = 0.02
MAX_BATCH: Final = 32  # with guidance 64 rows, what the exported UNet takes as well


@dataclass
class _Waiting:
    request: GenerateRequest
    picture: Future[Made] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> tuple[Any, ...]:
        one = self.request
        return one.steps, one.sampler, one.guidance_scale, one.width, one.height


class _Batcher:
    """One thread that runs the batch of whoever has waited longest."""

    def __init__(self, places: Places) -> None:
        self._pipeline, self._schedulers = open_pipeline(places.checkpoint)
        self._waiting: list[_Waiting] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lockstep")
        self._thread.start()

    def serve(self, request: GenerateRequest) -> Made:
        one = _Waiting(request)
        with self._wake:
            self._waiting.append(one)
            self._wake.notify()
        return one.picture.result()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                images = self._pictures([one.request for one in batch])
            except Exception as error:
                for one in batch:
                    one.picture.set_exception(error)
            else:
                for one, image in zip(batch, images, strict=True):
                    one.picture.set_result(Made(image))

    def _next_batch(self) -> list[_Waiting]:
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            oldest = self._waiting[0]
            self._wake.wait_for(
                lambda: self._closed or len(self._like(oldest)) == MAX_BATCH,
                timeout=max(0.0, oldest.arrived + WINDOW_SECONDS - time.monotonic()),
            )
            batch = self._like(oldest)
            self._waiting = [one for one in self._waiting if one not in batch]
            return batch

    def _like(self, oldest: _Waiting) -> list[_Waiting]:
        return [one for one in self._waiting if one.key == oldest.key][:MAX_BATCH]

    def _pictures(self, requests: list[GenerateRequest]) -> list[Any]:
        first = requests[0]
        self._pipeline.scheduler = self._schedulers[first.sampler or ""]
        images: list[Any] = self._pipeline(
            [one.prompt for one in requests],
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(one.seed) for one in requests],
        ).images
        return images


@contextmanager
def lockstep(places: Places) -> Iterator[Serve]:
    batcher = _Batcher(places)
    try:
        yield batcher.serve
    finally:
        batcher.close()
