"""The one thread that steps every active image."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from diffuserve.components import ComponentRunner, check_rows
from diffuserve.engine.policy import Candidate, StepPolicy
from diffuserve.engine.pool import LatentPool
from diffuserve.engine.track import Track
from diffuserve.errors import CancelledError, DiffuserveError, InternalError
from diffuserve.manifest import Component

__all__ = ["DenoiseLoop", "LoopCheckpoint"]

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopCheckpoint:
    """What the loop needs to know of one checkpoint."""

    unet: Component


class DenoiseLoop:
    """Steps all joined tracks, batch by batch, on a thread of its own, until it is closed.

    Whatever is raised in a step reaches the tracks of that step as an error, and the others go on.
    """

    def __init__(self, runner: ComponentRunner, policy: StepPolicy, checkpoints: Mapping[str, LoopCheckpoint]) -> None:
        self._runner, self._policy, self._checkpoints = runner, policy, checkpoints
        self._pools: dict[tuple[str, int, int], LatentPool] = {}
        self._active: dict[int, Track] = {}
        self._joining: list[Track] = []
        self._joined = 0
        self._closed = False
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

    def close(self) -> None:
        """Stop after the call that is under way; what is left gets an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
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
        with self._wake:
            while not (self._closed or self._joining or self._active):
                self._wake.wait()
            arrived, self._joining = self._joining, []
            closed = self._closed
        for track in arrived:
            self._guarded([track], lambda track=track: self._admit(track))  # type: ignore[misc]
        return not closed

    def _turn(self) -> None:
        """Let the cancelled leave, choose, step, and let the finished leave."""
        for track in list(self._active.values()):
            self._guarded([track], lambda track=track: self._drop_if_cancelled(track))  # type: ignore[misc]
        chosen = self._policy.choose([self._candidate(key, track) for key, track in self._active.items()])
        tracks = [self._active[one.key] for one in chosen]
        if tracks:
            self._guarded(tracks, lambda: self._step(tracks))
        for track in tracks:
            if track.slot >= 0:
                self._guarded([track], lambda track=track: self._after_step(track))  # type: ignore[misc]

    def _admit(self, track: Track) -> None:
        self._joined += 1
        track.joined = self._joined
        self._pools.setdefault(track.group, LatentPool()).join(track)
        self._active[track.joined] = track

    def _drop_if_cancelled(self, track: Track) -> None:
        if track.is_cancelled():
            raise CancelledError("the client cancelled")

    @staticmethod
    def _candidate(key: int, track: Track) -> Candidate:
        return Candidate(key, track.group, track.rows, track.last_stepped, track.joined)

    def _step(self, tracks: Sequence[Track]) -> None:
        unet = self._checkpoints[tracks[0].group[0]].unet
        self.calls += 1
        for track in tracks:
            track.last_stepped = self.calls
            if not track.joined_at_step:
                track.joined_at_step, track.started_at = self.calls, time.monotonic()

        def denoise(sample: torch.Tensor, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": hidden_states}
            return check_rows(unet, self._runner.run(unet, inputs)["model_output"], len(sample))

        self._pools[tracks[0].group].step(tracks, denoise)

    def _after_step(self, track: Track) -> None:
        done = track.steps_done(track.evaluation)
        if done > track.steps_done(track.evaluation - 1):
            track.on_step(done)
        if track.is_done:
            track.on_latents(self._leave(track))

    def _leave(self, track: Track) -> torch.Tensor:
        del self._active[track.joined]
        return self._pools[track.group].leave(track)

    def _guarded(self, tracks: Sequence[Track], act: Callable[[], None]) -> None:
        """Do something for some tracks; if it raises, they leave with the error and the loop goes on."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, DiffuserveError):
                _log.exception("a step failed")
            for track in tracks:
                if self._active.get(track.joined) is track:
                    self._leave(track)
                self._report(track.on_error, error)

    @staticmethod
    def _report(on_error: Callable[[BaseException], None], error: BaseException) -> None:
        try:
            on_error(error)
        except Exception:
            _log.exception("an error could not be delivered")
