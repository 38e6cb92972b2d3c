"""Requests, and the two ways to send them: all that may be at once (closed loop), or when they arrive (open loop)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from diffuserve.request import GenerateRequest
from measure.poisson import STEPS
from peers.common import SCHEDULERS, Picture, Serve
from shapes_recipe.world import trained_scenes

__all__ = ["Run", "closed_loop", "mixed_requests", "open_loop"]

GUIDANCE = 7.5


@dataclass(frozen=True)
class Run:
    """One system's run: wall seconds, and each request's latency and picture in the order of the requests."""

    wall: float
    latencies: list[float]
    pictures: list[Picture]

    @property
    def rate(self) -> float:
        """Images a second."""
        return len(self.latencies) / self.wall


def mixed_requests(count: int, seed: int, steps: Sequence[int] = STEPS) -> list[GenerateRequest]:
    """Steps and samplers drawn evenly, half of the requests without guidance."""
    rng = random.Random(seed)
    guidance = [1.0 if i % 2 else GUIDANCE for i in range(count)]
    rng.shuffle(guidance)
    return [
        GenerateRequest(
            prompt=rng.choice(trained_scenes()).caption,
            steps=rng.choice(steps),
            sampler=rng.choice(list(SCHEDULERS)),
            guidance_scale=scale,
            seed=i,
        )
        for i, scale in enumerate(guidance)
    ]


def closed_loop(serve: Serve, requests: Sequence[GenerateRequest], concurrency: int) -> Run:
    """Keep so many requests in the system until all are done."""

    def timed(request: GenerateRequest) -> tuple[float, Picture]:
        started = time.perf_counter()
        picture = serve(request)
        return time.perf_counter() - started, picture

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        done = list(pool.map(timed, requests))
    return Run(time.perf_counter() - started, [latency for latency, _ in done], [picture for _, picture in done])


def open_loop(serve: Serve, requests: Sequence[GenerateRequest], times: Sequence[float]) -> Run:
    """Send each request when it arrives, whatever is still under way; latencies count from the arrival."""
    latencies, pictures = [0.0] * len(requests), dict[int, Picture]()
    failures = list[BaseException]()
    started = time.perf_counter()

    def send(index: int) -> None:
        try:
            pictures[index] = serve(requests[index])
        except BaseException as error:
            failures.append(error)
        latencies[index] = time.perf_counter() - started - times[index]

    threads = [threading.Thread(target=send, args=(index,), daemon=True) for index in range(len(requests))]
    for arrival, thread in zip(times, threads, strict=True):
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Run(time.perf_counter() - started, latencies, [pictures[index] for index in range(len(requests))])
