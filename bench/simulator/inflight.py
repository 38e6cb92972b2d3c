"""The service on a virtual clock. What it decides, the real StepPolicy decides; its order of events is service.py's."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from diffuserve.engine import Candidate, Demand, Eta, Step, StepPolicy
from diffuserve.errors import QueueFullError
from simulator.clock import Clock, Device, Lane
from simulator.costs import CostTable
from simulator.server import Calls, Texts
from simulator.workload import SimRequest

__all__ = ["InFlightServer"]

_FINISH_WORKERS = 2
_MAX_TEXTS = 64


@dataclass(slots=True, eq=False)
class _Image:
    """One request on its way: what Job and Track are in the service."""

    request: SimRequest
    demand: Demand
    eta: Eta
    accepted: float
    remaining: int
    joined: int = 0
    ready: float = 0.0
    waiting_since: float = 0.0
    stepped: float = 0.0

    @property
    def urgency(self) -> tuple[int, int]:
        return self.request.steps, self.request.key


class InFlightServer:
    """Text encoding and VAE decoding beside one loop that steps every image, all on one device.

    `policy` is built as the service builds it, on costs that the table fills and that the calls' simulated seconds go
    on changing. `texts` are those whose encoding it has from before.
    """

    def __init__(self, clock: Clock, table: CostTable, texts: Texts | None = None) -> None:
        self._clock, self._table = clock, table
        self.policy = StepPolicy(costs=table.step_costs(), max_rows=lambda _: table.max_rows)
        self.device = Device(clock, table.sharing)
        self._encoder, self._unet, self._decoder = (Lane(self.device) for _ in range(3))
        self._texts = texts or Texts()
        self._present: dict[int, _Image] = {}
        self._unprepared: list[_Image] = []
        self._preparing = False
        self._active: dict[int, _Image] = {}
        self._joined = 0
        self._stepping = False
        self._unfinished: list[tuple[tuple[int, int], _Image]] = []
        self._idle_finishers = _FINISH_WORKERS
        self._row_steps = 0
        self.counted = Calls()
        self.on_end: Callable[[SimRequest, bool], None] = lambda *_: None

    @property
    def work(self) -> float:
        return self._row_steps * self._table.row + len(self._present) * self._table.vae_decoder

    def submit(self, request: SimRequest) -> None:
        self._row_steps += request.rows * request.steps
        self._clock.after(self._table.before, lambda: self._accept(request))

    def _accept(self, request: SimRequest) -> None:
        demand = Demand(self._table.group, request.rows, request.steps)
        present = [self._demand(one) for one in self._present.values() if one.remaining]
        try:
            eta = self.policy.admit([demand], present, self._clock.now, stepped=len(self._present) - len(present))
        except QueueFullError:
            self._row_steps -= request.rows * request.steps
            self._clock.after(self._table.reply, lambda: self.on_end(request, False))
            return
        image = _Image(request, demand, eta, self._clock.now, request.steps)
        self._present[request.key] = image
        self._unprepared.append(image)
        self._prepare()

    def _demand(self, image: _Image) -> Demand:
        if image.remaining == image.demand.remaining:
            return image.demand
        return Demand(image.demand.group, image.demand.rows, image.remaining, length=image.request.steps)

    def _prepare(self) -> None:
        """Encode the texts of the most urgent, and of all others that fit into the call."""
        if self._preparing or not self._unprepared:
            return
        self._preparing = True
        batch, rows = list[_Image](), 0
        for image in sorted(self._unprepared, key=lambda one: one.urgency):
            if rows + image.request.rows <= _MAX_TEXTS:
                batch.append(image)
                rows += image.request.rows
        self._unprepared = [one for one in self._unprepared if one not in batch]
        new = self._texts.new(text for image in batch for text in image.request.texts)
        if new:
            self._encoder.call(self._table.text_encoder(new), lambda: self._encoded(batch))
        else:
            self._encoded(batch)

    def _encoded(self, batch: list[_Image]) -> None:
        self._clock.after(self._table.join, lambda: self._join(batch))

    def _join(self, batch: list[_Image]) -> None:
        for image in batch:
            self._joined += 1
            image.joined = self._joined
            image.ready = image.waiting_since = self._clock.now
            self._active[image.joined] = image
        self._preparing = False
        self._prepare()
        if not self._stepping:
            self._turn()

    def _turn(self) -> None:
        """The loop: choose, step, and let the finished leave."""
        now = self._clock.now
        step = self.policy.choose([self._candidate(one) for one in self._active.values()], now)
        self._stepping = step is not None
        if step is None:
            return
        for one in step.chosen:
            self._active[one.key].waiting_since = now
        self.counted.count(step.rows, sum(one.rows for one in step.chosen))
        self._unet.call(
            self._table.unet_call(step.rows),
            lambda: self._clock.after(self._table.between(step.rows), lambda: self._stepped(step, now)),
        )

    def _candidate(self, image: _Image) -> Candidate:
        return Candidate(
            key=image.joined,
            group=image.demand.group,
            rows=image.demand.rows,
            length=image.request.steps,
            remaining=image.remaining,
            joined=image.joined,
            waiting_since=image.waiting_since,
        )

    def _stepped(self, step: Step, started: float) -> None:
        self.policy.settle(step, self._clock.now - started)
        for one in step.chosen:
            image = self._active[one.key]
            image.remaining -= 1
            self._row_steps -= one.rows
            if not image.remaining:
                image.stepped = self._clock.now
                del self._active[one.key]
                heapq.heappush(self._unfinished, (image.urgency, image))
        self._finish()
        self._turn()

    def _finish(self) -> None:
        while self._idle_finishers and self._unfinished:
            self._idle_finishers -= 1
            _, image = heapq.heappop(self._unfinished)
            self._decoder.call(
                self._table.vae_decoder,
                lambda image=image: self._clock.after(  # type: ignore[misc]
                    self._table.file, lambda: self._finished(image)
                ),
            )

    def _finished(self, image: _Image) -> None:
        del self._present[image.request.key]
        seconds = self._clock.now - image.accepted
        self.policy.learn([image.demand], image.eta, seconds - (image.stepped - image.ready), seconds)
        self._clock.after(self._table.reply, lambda: self.on_end(image.request, True))
        self._idle_finishers += 1
        self._finish()
