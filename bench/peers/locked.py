"""(a) diffusers' pipeline behind a lock, as web servers around it do: one request after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffuserve.request import GenerateRequest
from peers.common import Made, Places, Serve, open_pipeline

__all__ = ["locked"]


@contextmanager
def locked(places: Places) -> Iterator[Serve]:
    pipeline, schedulers = open_pipeline(places.checkpoint)
    lock = threading.Lock()

    def serve(request: GenerateRequest) -> Made:
        with lock:
            pipeline.scheduler = schedulers[request.sampler or ""]
            (image,) = pipeline(
                request.prompt,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed),
            ).images
        return Made(image)

    yield serve
