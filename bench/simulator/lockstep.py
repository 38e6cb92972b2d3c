"""The peer: whole batches. Requests wait for each other, start together and end together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from simulator.clock import Clock, Device
from simulator.costs import CostTable
from simulator.server import Calls, Texts
from simulator.workload import SimRequest

__all__ = ["LockstepServer"]


class LockstepServer:
    """Batches of up to `size` requests, taken in the order of their arrival by `devices` devices.

    A batch starts when a device is free and the batch is full, or its oldest request has waited for `window` seconds.
    It encodes its texts, runs every request to the longest one's steps, decodes one picture after the other, and
    answers all. `alike` lets only requests of the same steps and guidance share a batch, as a pipeline's call wants it
    (bench/peers/lockstep.py); without it any do, and the short ones' rows are carried along to the end.

    Costs are those that the in-flight server has, the time between two UNet calls and around the request included.
    """

    def __init__(
        self, clock: Clock, table: CostTable, *, size: int, window: float, alike: bool, devices: int = 1
    ) -> None:
        self._clock, self._table = clock, table
        self._size, self._window, self._alike = size, window, alike
        self._free = [Device(clock, table.sharing) for _ in range(devices)]
        self._waiting: dict[int, SimRequest] = {}
        self._arrived: dict[int, float] = {}
        self._texts = Texts()
        self._work = 0.0
        self.counted = Calls()
        self.on_end: Callable[[SimRequest, bool], None] = lambda *_: None

    @property
    def work(self) -> float:
        return self._work

    def submit(self, request: SimRequest) -> None:
        self._work += self._seconds_of(request)
        self._clock.after(self._table.before + self._table.join, lambda: self._accept(request))

    def _seconds_of(self, request: SimRequest) -> float:
        return request.rows * request.steps * self._table.row + self._table.vae_decoder

    def _accept(self, request: SimRequest) -> None:
        self._waiting[request.key] = request
        self._arrived[request.key] = self._clock.now
        self._clock.after(self._window, self._start)  # when it has waited long enough
        self._start()

    def _start(self) -> None:
        """Start as many batches as there are free devices and batches that need not wait."""
        while self._free and self._waiting:
            oldest = next(iter(self._waiting.values()))
            batch = list(islice((one for one in self._waiting.values() if self._fits(one, oldest)), self._size))
            if len(batch) < self._size and self._clock.now < self._arrived[oldest.key] + self._window:
                return
            for one in batch:
                del self._waiting[one.key], self._arrived[one.key]
            self._run(batch, self._free.pop())

    def _fits(self, one: SimRequest, oldest: SimRequest) -> bool:
        return not self._alike or (one.steps, one.guided) == (oldest.steps, oldest.guided)

    def _run(self, batch: list[SimRequest], device: Device) -> None:
        table = self._table
        rows, steps = sum(one.rows for one in batch), max(one.steps for one in batch)
        for done in range(steps):
            self.counted.count(rows, sum(one.rows for one in batch if one.steps > done))
        new = self._texts.new(text for one in batch for text in one.texts)
        seconds = steps * (table.unet_call(rows) + table.between(rows)) + len(batch) * table.vae_decoder
        seconds += table.text_encoder(new) if new else 0.0
        device.start(seconds, lambda: self._ended(batch, device))

    def _ended(self, batch: list[SimRequest], device: Device) -> None:
        for one in batch:
            self._work -= self._seconds_of(one)
            answered = self._table.file + self._table.reply
            self._clock.after(answered, lambda one=one: self.on_end(one, True))  # type: ignore[misc]
        self._free.append(device)
        self._start()
