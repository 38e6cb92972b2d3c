"""The one thread that steps every active image."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from diffuserve.components import ComponentRunner, cast_inputs, check_rows, input_type
from diffuserve.engine.costs import Group
from diffuserve.engine.policy import Step, StepPolicy
from diffuserve.engine.pool import LatentPool
from diffuserve.engine.track import Track
from diffuserve.errors import CancelledError, DeadlineError, DiffuserveError, InternalError
from diffuserve.lora.choice import LoraKey
from diffuserve.lora.stack import AdapterStack
from diffuserve.manifest import Component
from diffuserve.spec import CONTROL
from diffuserve.telemetry import Telemetry

__all__ = ["DenoiseLoop", "LoopCheckpoint", "Trial"]

_log: Final = logging.getLogger(__name__)

_IDLE_POOLS: Final = 4  # groups whose memory is kept although nothing of them runs
_TRIAL_AGAIN_S: Final = 0.25
_TRIAL_LOOK_S: Final = 1.0  # while what they call is not in memory
_LONGEST_TRIAL_S: Final = 1.0
_LAST_TRIAL_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class LoopCheckpoint:
    """What the loop needs to know of one checkpoint."""

    unet: Component


@dataclass(frozen=True, slots=True)
class Trial:
    """A UNet call on no one's behalf, made while the loop is idle, so that its cost is known before it is needed.

    One that is not possible is left for later.
    """

    group: Group
    rows: int
    run: Callable[[], object]
    is_possible: Callable[[], bool] = lambda: True


class DenoiseLoop:
    """Steps all joined tracks, batch by batch, on a thread of its own, until it is closed.

    `checkpoints` finds what it needs of one by its name. Whatever is raised in a step reaches the tracks of that step
    as an error, and the others go on.
    """

    def __init__(
        self,
        runner: ComponentRunner,
        policy: StepPolicy,
        checkpoints: Callable[[str], LoopCheckpoint],
        *,
        telemetry: Telemetry | None = None,
        device: torch.device | None = None,
        trials: Iterable[Trial] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._policy, self._checkpoints = runner, policy, checkpoints
        self._telemetry, self._device, self._clock = telemetry or Telemetry(), device, clock
        self._pools: dict[Group, LatentPool] = {}
        self._active: dict[int, Track] = {}
        self._joining: list[Track] = []
        self._trials = list(trials)
        self._joined = 0
        self._closed = self._suspending = self._trying = False
        self._busy_since: float | None = None
        self._wake = threading.Condition()
        #: UNet calls so far; the number of the next call is one more.
        self.calls = 0
        self._thread = threading.Thread(target=self._run, name="denoise-loop", daemon=True)
        self._thread.start()

    def join(self, tracks: Sequence[Track]) -> None:
        """Let tracks take part from the next UNet call on. Raises InternalError once the loop is closed."""
        with self._wake:
            if self._closed:
                raise InternalError("the denoising loop has stopped")
            self._joining.extend(tracks)
            self._wake.notify()

    def suspend(self) -> None:
        """Let go of every image after the call that is under way, and of those that join later at once.

        Each hears what it has become by `on_suspend`, so that another server can go on with it.
        """
        with self._wake:
            self._suspending = True
            self._wake.notify()

    def stalled(self) -> float:
        """Seconds since the loop last did anything, where it has something to do; 0 where it has not."""
        busy = self._busy_since
        return 0.0 if busy is None else self._clock() - busy

    def close(self) -> None:
        """Stop after the call that is under way; what is left gets an error.

        A trial is waited for a moment only: Triton 24.10 never answers a call that it gets while it stops.
        """
        with self._wake:
            self._closed = True
            trying = self._trying
            self._wake.notify()
        self._thread.join(_LAST_TRIAL_S if trying else None)
        if self._thread.is_alive():
            _log.warning("a trial is not answered; the denoising loop is left with it")
            self._stop(CancelledError("the server is shutting down"))

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                if self._suspending:
                    self._let_go()
                self._guarded(list(self._active.values()), self._turn)
        except BaseException as error:  # the thread must not end in silence: its clients would wait forever
            _log.exception("the denoising loop ended")
            self._stop(InternalError(f"the denoising loop ended: {error!r}"))
        else:
            self._stop(CancelledError("the server is shutting down"))

    def _stop(self, error: DiffuserveError) -> None:
        with self._wake:
            self._closed = True
            left = [*self._active.values(), *self._joining]
            self._joining.clear()
        self._active.clear()
        for track in left:
            self._report(track.on_error, error)

    def _wait_for_work(self) -> bool:
        """Let arrivals in, waiting for them where nothing runs. False once the loop is closed."""
        with self._wake:
            idle = not (self._closed or self._joining or self._active)
            self._busy_since = None if idle else self._clock()
            trial = next((one for one in self._trials if one.is_possible()), None) if idle else None
            if idle and trial is None:
                self._wake.wait(_TRIAL_LOOK_S if self._trials else None)
            self._busy_since = self._clock()
            arrived, self._joining = self._joining, []
            closed = self._closed
            self._trying = trial is not None and not arrived and not closed
        if trial is not None and self._trying:
            self._try(trial)
            self._trying = False
        for track in arrived:
            self._guarded([track], partial(self._admit, track))
        return not closed

    def _try(self, trial: Trial) -> None:
        started = self._clock()
        if self._policy.costs.seconds(trial.group, trial.rows) > _LONGEST_TRIAL_S:
            self._trials.remove(trial)  # a request that came now would wait for it; what is known says enough
            return
        try:
            trial.run()
        except DiffuserveError as error:  # most likely Triton is still loading the component
            _log.debug("a trial failed: %s", error)
            with self._wake:
                if not (self._closed or self._joining):
                    self._wake.wait(_TRIAL_AGAIN_S)
            return
        except Exception:
            _log.exception("a trial failed")
        else:
            self._policy.costs.observe(trial.group, trial.rows, self._clock() - started)
        self._trials.remove(trial)

    def _let_go(self) -> None:
        for track in list(self._active.values()):
            self._guarded([track], partial(self._hand_over, track))

    def _hand_over(self, track: Track) -> None:
        track.on_suspend(*self._leave(track))

    def _turn(self) -> None:
        """Let the cancelled and the late leave, choose, step, and let the finished leave."""
        now = self._clock()
        for track in list(self._active.values()):
            self._guarded([track], partial(self._drop, track, now))
        step = self._policy.choose([track.candidate() for track in self._active.values()], now)
        if step is None:
            return
        tracks = [self._active[one.key] for one in step.chosen]
        self._guarded(tracks, partial(self._step, tracks, step))
        for track in tracks:
            if track.slot >= 0:
                self._guarded([track], partial(self._after_step, track))

    def _admit(self, track: Track) -> None:
        self._joined += 1
        track.joined, track.joined_at = self._joined, self._clock()
        track.waiting_since = track.joined_at
        self._pool(track.group).join(track)
        self._active[track.joined] = track

    def _pool(self, group: Group) -> LatentPool:
        if group not in self._pools:
            unet = self._checkpoints(group.checkpoint).unet
            adapters = AdapterStack[LoraKey](unet, self._device) if unet.lora else None
            self._pools[group] = LatentPool(self._device, adapters=adapters, control=input_type(unet, CONTROL))
        return self._pools[group]

    def _drop(self, track: Track, now: float) -> None:
        if track.is_cancelled():
            raise CancelledError("the client cancelled")
        if self._policy.is_late(track.deadline, now):
            raise DeadlineError(
                f"the deadline passed after {track.steps_done(track.evaluation)} of {track.trajectory.steps} steps; "
                "allow more time, or ask for fewer steps",
                steps_done=track.steps_done(track.evaluation),
            )

    def _step(self, tracks: Sequence[Track], step: Step) -> None:
        group, started, engine = step.group, self._clock(), 0.0
        unet = self._checkpoints(group.checkpoint).unet
        trace = next((track.trace for track in tracks if track.trace is not None), None)
        self.calls += 1
        for track in tracks:
            track.waiting_since = started
            if not track.joined_at_step:
                track.joined_at_step, track.started_at = self.calls, started
                self._telemetry.joined(group.checkpoint, started - track.joined_at)
                track.on_start()

        def denoise(
            sample: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
        ) -> torch.Tensor:
            nonlocal engine
            inputs = {"sample": sample, "timestep": timestep, **conditioning}
            called = self._clock()
            outputs = self._runner.run(unet, cast_inputs(unet, inputs), trace=trace)
            engine = self._clock() - called
            return check_rows(unet, outputs["model_output"], len(sample))

        self._pools[group].step(tracks, denoise, step.rows)
        seconds = self._clock() - started
        self._policy.settle(step, seconds, math.lcm(*(track.chunks for track in tracks)))
        self._telemetry.stepped(group, step.rows, seconds, engine)

    def _after_step(self, track: Track) -> None:
        done = track.steps_done(track.evaluation)
        if done > track.steps_done(track.evaluation - 1):
            track.on_step(done)
        if track.predicted is not None:
            predicted, track.predicted = track.predicted, None
            track.on_predicted(done, predicted)
        if track.is_done:
            track.on_latents(self._leave(track)[0])

    def _leave(self, track: Track) -> tuple[torch.Tensor, torch.Tensor]:
        """The track's latents and history; its place is free, also where there is no memory for them."""
        try:
            return self._pools[track.group].state(track)
        finally:
            self._remove(track)

    def _remove(self, track: Track) -> None:
        del self._active[track.joined]
        pool = self._pools[track.group]
        pool.leave(track)
        if pool.is_empty and len(self._pools) > _IDLE_POOLS:
            del self._pools[track.group]

    def _guarded(self, tracks: Sequence[Track], act: Callable[[], None]) -> None:
        """Do something for some tracks; if it raises, they leave with the error and the loop goes on."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, DiffuserveError):
                _log.exception("a step failed")
            for track in tracks:
                if self._active.get(track.joined) is track:
                    self._remove(track)
                self._report(track.on_error, error)

    @staticmethod
    def _report(on_error: Callable[[BaseException], None], error: BaseException) -> None:
        try:
            on_error(error)
        except Exception:
            _log.exception("an error could not be delivered")
