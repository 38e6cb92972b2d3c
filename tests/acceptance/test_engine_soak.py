"""Ten thousand requests that end in every way there is: none is lost, none is answered twice, nothing is kept."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from pathlib import Path

import psutil

from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.errors import DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve.service import DiffusionService
from unit.fakes import FakeModels, Recorder, write_deployment

REQUESTS = 10_000
AT_ONCE = 24


class Flaky(FakeModels):
    """Components that fail now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(3)
        self.before_unet = self._unet
        self.before_decode = self._decode

    def _unet(self, call: int) -> None:
        # The lists are for tests that look at every call.
        self.rows.clear()
        self.timesteps.clear()
        if self.random.random() < 0.002:
            raise MemoryError("the engine ran out of memory")

    def _decode(self) -> None:
        if self.random.random() < 0.005:
            raise MemoryError("the decoder ran out of memory")


class Counted(Recorder):
    """A reply that cancels at a given event, keeps no pictures, and frees a place when it has ended."""

    def __init__(self, places: threading.Semaphore, cancel_at: int) -> None:
        super().__init__()
        self.places, self.cancel_at, self.seen = places, cancel_at, 0

    def send(self, event: Event, *, final: bool) -> None:
        super().send(event, final=final)
        self.events.clear()
        self.seen += 1
        self.cancelled = self.cancelled or self.seen == self.cancel_at
        if final:
            self.places.release()

    def fail(self, error: DiffuserveError) -> None:
        super().fail(error)
        self.places.release()


def test_ten_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    models, rng, outcomes = Flaky(), random.Random(7), Counter[str]()
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 16, max_images=2 * AT_ONCE)
    service = DiffusionService(write_deployment(tmp_path, "one", "two"), models.runner(), policy=policy)
    places, process, memory = threading.Semaphore(AT_ONCE), psutil.Process(), list[int]()
    replies: list[Counted] = []
    for number in range(REQUESTS):
        places.acquire()
        reply = Counted(places, cancel_at=rng.choice([0, 0, 0, 1, 2, 3]))
        reply.cancelled = rng.random() < 0.03
        request = GenerateRequest(
            prompt=rng.choice(["a circle", "", "a very long prompt " * 20]),
            checkpoint=rng.choice(["one", "two"]),
            steps=rng.choice([1, 2, 4, 6]),
            sampler=rng.choice(["ddim", "euler", "dpmpp_2m", "pndm"]),
            guidance_scale=rng.choice([1.0, 5.0]),
            width=rng.choice([64, 96]),
            num_images=rng.choice([1, 1, 1, 3]),
            progress_every=rng.choice([0, 1]),
            deadline_ms=rng.choice([0, 0, 0, 400]),
            priority=rng.choice([-1, 0, 1]),
            client_tag=rng.choice(["", "shop", "boards"]),
            seed=number,
        )
        try:
            service.submit(request, reply)
        except DiffuserveError as error:
            outcomes[f"refused: {error.code}"] += 1
            places.release()
            continue
        replies.append(reply)
        if len(replies) >= 500:
            outcomes.update(_settle(replies))
            gc.collect()
            memory.append(process.memory_info().rss)
    outcomes.update(_settle(replies))
    service.close()

    assert outcomes.total() == REQUESTS
    assert {"done", "cancelled", "component_failed"} <= set(outcomes), outcomes
    assert not service._jobs
    second_half = memory[len(memory) // 2 :]
    assert max(second_half) <= 1.05 * min(second_half), f"{outcomes}: {[one // 2**20 for one in memory]} MiB"
    print(f"{dict(outcomes)}; resident {[one // 2**20 for one in memory]} MiB")


def _settle(replies: list[Counted]) -> Counter[str]:
    """Wait for all of them; Recorder itself asserts that nothing comes after an end."""
    for reply in replies:
        reply.wait()
    outcomes = Counter(reply.error.code if reply.error else "done" for reply in replies)
    assert all(reply.finals == 1 for reply in replies)
    replies.clear()
    return outcomes
