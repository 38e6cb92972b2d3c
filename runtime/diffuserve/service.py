"""The service: a request in, events out.

    submit -> admission -> text encoders and first latents -> the denoising loop -> VAE and image file -> reply

The loop's thread only steps: encoding and decoding run on workers beside it. Whatever fails on the way, the
request's reply gets exactly one final answer.
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch

from diffuserve import __version__
from diffuserve.beginnings import Beginnings, demands
from diffuserve.checkpoint import Checkpoint
from diffuserve.components import ComponentRunner
from diffuserve.engine import Demand, DenoiseLoop, Group, LoopCheckpoint, StepCosts, StepPolicy
from diffuserve.errors import DrainingError
from diffuserve.heartbeats import Heartbeats
from diffuserve.job import Job, Reply, shutting_down
from diffuserve.keeper import Keeper, ModelControl, Unmanaged
from diffuserve.lora.choice import lora_key
from diffuserve.lora.folder import DEFAULT_BUDGET, LoraFolder
from diffuserve.lora.room import AdapterRoom
from diffuserve.manifest import Deployment
from diffuserve.pictures import Pictures
from diffuserve.prompts import EmbeddingFolder
from diffuserve.registry import CheckpointRegistry
from diffuserve.request import GenerateRequest
from diffuserve.residency import Limits
from diffuserve.rollout.live import LiveRollout
from diffuserve.snapshot import encode_snapshot
from diffuserve.spec import UNET
from diffuserve.telemetry import Telemetry
from diffuserve.trials import trials
from diffuserve.wire import WIRE_VERSION
from diffuserve.workers import Workers

__all__ = ["DiffusionService", "Reply"]

_LOOK_S: Final = 0.5  # between two looks at those that wait: clients cancel, and deadlines pass
_LOOK_AT_LORAS_S: Final = 0.05  # in one answer to `status`, by which others tell whether the server lives


class DiffusionService:
    """Serves the checkpoints of one deployment through one denoising loop.

    policy      what decides; without one, a StepPolicy with the manifests' row limits and `target_step`
    target_step seconds that a UNet call should not exceed, or None
    calibrate   measure the UNets' costs whenever the loop is idle, until they are known
    key         what snapshots are signed with; servers that hand over to each other have the same
    device      where latents live: the engines' own
    embeddings  the folder of textual inversions; without one, that of the deployment
    loras       the folder of LoRAs, likewise
    lora_budget the bytes of LoRA files that are held in memory; adapters of requests under way take as much at most
    control     loads and unloads components, once `open` was called; without one they are always there
    limits      of memory and time, for components that come and go
    weights     of checkpoints, for their shares of the stepping time; 1 where none is given
    pinned      checkpoints whose components never leave
    """

    def __init__(
        self,
        deployment: Deployment,
        runner: ComponentRunner,
        *,
        policy: StepPolicy | None = None,
        telemetry: Telemetry | None = None,
        calibrate: bool = False,
        key: bytes = b"",
        device: torch.device | None = None,
        target_step: float | None = None,
        embeddings: Path | None = None,
        loras: Path | None = None,
        lora_budget: int = DEFAULT_BUDGET,
        control: ModelControl | None = None,
        limits: Limits | None = None,
        weights: Mapping[str, float] | None = None,
        pinned: Collection[str] = (),
    ) -> None:
        self._telemetry, self._deployment = telemetry or Telemetry(), deployment
        folder = EmbeddingFolder(embeddings or deployment.embeddings)
        registry = LoraFolder(loras or deployment.loras, lora_budget, self._telemetry)
        self._checkpoints = CheckpointRegistry(
            [Checkpoint(deployment, name, runner, folder, registry) for name in deployment.checkpoints]
        )
        self._room = AdapterRoom(lora_budget)
        self._weights = dict(weights or {})
        for name in (*self._weights, *pinned):
            self._checkpoints.find(name)
        self._checkpoints.listeners.append(lambda one, _: self._telemetry.deployed(one.name))
        self._policy = policy or StepPolicy(
            costs=StepCosts(),
            max_rows=self.max_rows,
            max_adapters=self.max_adapters,
            row_buckets=self.row_buckets,
            target_step=target_step,
            weight=self.weight,
        )
        self._keeper = Keeper(
            self._checkpoints, control or Unmanaged(), limits or Limits(), pinned=pinned, telemetry=self._telemetry
        )
        self.loop = DenoiseLoop(
            runner,
            self._policy,
            lambda name: LoopCheckpoint(self._checkpoints[name].manifest.components[UNET]),
            telemetry=self._telemetry,
            device=device,
            trials=trials(self._checkpoints, self._keeper) if calibrate else (),
        )
        self._key = key or secrets.token_bytes(32)
        self._prepare = Workers(1, "prepare")
        self._pictures = Pictures()
        self._unprepared: list[Job] = []
        self._jobs: set[Job] = set()
        #: Signs of life for requests, also before they are submitted.
        self.heartbeats = Heartbeats()
        self._draining = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        if control is None:
            self._keeper.open(at_once=True)
        self._rollout = LiveRollout(
            deployment.root,
            self._checkpoints,
            lambda name: Checkpoint(deployment, name, runner, folder, registry),
            self._keeper.prove,
        )
        self._beginnings = Beginnings(self._checkpoints, self._rollout, self._key)
        self.heartbeats.add(self)

    def open(self) -> None:
        """Components can be loaded and called from now on. Harmless when it was called before."""
        self._keeper.open()

    def may_use(self, model: str) -> bool:
        """Whether a Triton model is meant to be in memory."""
        return self._keeper.may_use(model)

    def lacking(self, model: str) -> str:
        """What keeps a Triton model from being loaded, as far as its files tell; else empty."""
        every = (component for one in self._checkpoints.values() for component in one.manifest.components.values())
        return next((self._deployment.lacking(component) for component in every if component.model == model), "")

    def weight(self, checkpoint: str) -> float:
        """A checkpoint's weight beside others."""
        return self._weights.get(checkpoint, 1.0)

    def max_rows(self, group: Group) -> int:
        """The rows that the group's engine takes in one call."""
        return self._checkpoints[group.checkpoint].manifest.max_rows(UNET, group.width, group.height)

    def max_adapters(self, group: Group) -> int:
        """The adapters that the group's engine takes in one call, beside none at all."""
        lora = self._checkpoints[group.checkpoint].manifest.components[UNET].lora
        return lora.adapters - 1 if lora else 0

    def row_buckets(self, group: Group) -> tuple[int, ...]:
        """The row counts that the group's engine wants."""
        return self._checkpoints[group.checkpoint].manifest.row_buckets(UNET, group.width, group.height)

    def submit(
        self, request: GenerateRequest, reply: Reply, *, request_id: str = "", trace: object | None = None
    ) -> None:
        """Accept a request; its events follow on `reply`.

        Raises DiffuserveError for a request that is not accepted: then nothing is sent on `reply`.
        """
        request_id = request_id or uuid.uuid4().hex
        beginning = self._beginnings.of(request, request_id)
        self._keeper.check(beginning.resolved.checkpoint)
        job = Job(beginning, demands(beginning), reply, request_id, trace)
        job.on_end = self._ended
        job.pack = partial(encode_snapshot, key=self._key)
        with self._lock:
            if self._draining:
                raise _draining()
            left = sum(other.left for other in self._jobs)  # before those that are stepped, whose number falls
            present = [demand for other in self._jobs for demand in other.present()]
            waits = {name: self._keeper.wait(name) for name in {job.resolved.checkpoint, *_named(present)}}
            job.eta = self._policy.admit(
                job.demands, present, job.accepted_at, job.deadline, waits.__getitem__, stepped=left - len(present)
            )
            self._jobs.add(job)
            self._unprepared.append(job)
            self._report_load()
        job.guarded(partial(self._enter, job))

    def _enter(self, job: Job) -> None:
        """A request is accepted: from here on, its job answers for it."""
        self.heartbeats.add(job)
        self._telemetry.accepted(job.request_id, job.resolved.checkpoint, job.eta.seconds)
        job.stay.on_ready = partial(self._prepare_soon, job)
        job.stay.on_failed = job.fail
        self._keeper.enter(job.stay)
        if not job.stay.is_inside:
            job.tell_queued()

    def _prepare_soon(self, job: Job) -> None:
        if not self._prepare.submit(job.urgency, self._prepare_waiting):
            job.fail(shutting_down())

    def beat(self, now: float) -> float:  # noqa: ARG002 - as heartbeats.Beating
        """End those that wait to begin, for components or adapters' room, and whose clients or deadlines do not."""
        with self._lock:
            waiting = list(self._unprepared)
        for job in waiting:
            job.guarded(job.check)
        return _LOOK_S

    def drain(self, grace: float) -> None:
        """Take no new requests, and return when the last one under way has ended.

        What is not done after `grace` seconds ends with a snapshot that another server goes on from.
        """
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._jobs, grace)
            unprepared, self._unprepared = self._unprepared, []
        for job in unprepared:
            job.guarded(partial(job.suspend, *job.beginning.images))
        self.loop.suspend()
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def status(self) -> dict[str, object]:
        """What the server is doing, for whoever watches it."""
        kept = self._keeper.status()
        until = time.monotonic() + _LOOK_AT_LORAS_S
        for name, one in kept["checkpoints"].items():
            one["weight"] = self.weight(name)
            one.update(self._checkpoints[name].told(until))
        with self._lock:
            waiting = sum(job.is_waiting() for job in self._jobs)
            return {
                "version": __version__,
                "wire_version": WIRE_VERSION,
                "state": "draining" if self._draining else "serving",
                "waiting": waiting,
                "active": len(self._jobs) - waiting,
                "stalled_s": round(max(one.stalled() for one in (self.loop, self._prepare, self._pictures)), 3),
                **kept,
                "rollout": self._rollout.status(),
            }

    def close(self) -> None:
        """Stop stepping. Requests under way end with an error."""
        self._rollout.close()
        with self._lock:
            waiting = [job for job in self._unprepared if not job.stay.is_inside]
        for job in waiting:
            job.fail(shutting_down())
        self._keeper.close()
        self._prepare.close()
        self.loop.close()
        for job in self._unprepared:  # which waited for others' adapters to go
            job.fail(shutting_down())
        self._pictures.close()
        self.heartbeats.close()

    def _ended(self, job: Job, outcome: str) -> None:
        with self._lock:
            self._jobs.discard(job)
            self._unprepared = [one for one in self._unprepared if one is not job]
            is_others_turn = self._room.release(job) and bool(self._unprepared)
            seconds = time.monotonic() - job.accepted_at
            if outcome == "done" and not job.stay.waited:  # what loads take is no part of what requests do
                around = seconds - (job.stepped_at - job.ready_at)
                self._policy.learn(job.demands, job.eta, around, seconds)
            self._report_load()
            self._changed.notify_all()
        self._keeper.leave(job.stay)
        if is_others_turn:
            self._prepare.submit(job.urgency, self._prepare_waiting)
        self._telemetry.ended(job.request_id, job.resolved.checkpoint, outcome, job.eta.seconds, seconds)

    def _started(self) -> None:
        with self._lock:
            self._report_load()

    def _report_load(self) -> None:
        waiting = sum(job.is_waiting() for job in self._jobs)
        self._telemetry.load(waiting, len(self._jobs) - waiting)

    def _prepare_waiting(self) -> None:
        """Adapters, text encoding and first latents of everyone who waits; then their images join the loop."""
        taken = self._take_unprepared()
        if not taken:
            return
        self._prepare.submit(taken[0].urgency, self._prepare_waiting)  # for those that found no room before
        checkpoint = self._checkpoints[taken[0].resolved.checkpoint]
        batch = [job for job in taken if job.guarded(partial(self._begin, checkpoint, job))]
        if not batch:
            return
        try:
            told = checkpoint.condition([job.resolved for job in batch], batch[0].trace)
        except Exception as error:
            for job in batch:
                job.guarded(partial(_raise, error))
            return
        for job, one in zip(batch, told, strict=True):
            job.guarded(partial(self._join, checkpoint, job, one))

    @staticmethod
    def _begin(checkpoint: Checkpoint, job: Job) -> None:
        job.begin()
        job.adapt(checkpoint.loras.adapter(job.resolved.loras))

    def _take_unprepared(self) -> list[Job]:
        """The most urgent request and others of its checkpoint, as many as the text encoders take in one call.

        Where there is no room for more adapters, those that need one wait, in the order in which they came.
        """
        with self._lock:
            ready, is_full = list[Job](), False
            for job in self._unprepared:
                if not job.stay.is_inside:
                    continue
                if self._has_room(job, may_grow=not is_full):
                    ready.append(job)
                else:
                    is_full = True
            if not ready:
                return []
            waiting = sorted(ready, key=lambda job: job.urgency)
            name, windows, taken = waiting[0].resolved.checkpoint, 0, list[Job]()
            most = self._checkpoints[name].condition.max_windows
            for job in waiting:
                needed = job.resolved.rows * job.resolved.reading.chunks
                if job.resolved.checkpoint == name and (not taken or windows + needed <= most):
                    taken.append(job)
                    windows += needed
            self._unprepared = [job for job in self._unprepared if job not in taken]
            return taken

    def _has_room(self, job: Job, *, may_grow: bool) -> bool:
        name, key = job.resolved.checkpoint, lora_key(job.resolved.loras)
        size = self._checkpoints[name].loras.bytes
        return not key or self._room.take(job, (name, key), size, may_grow=may_grow)

    def _join(self, checkpoint: Checkpoint, job: Job, conditioning: Mapping[str, torch.Tensor]) -> None:
        given, control = checkpoint.encode(job.resolved, trace=job.trace), checkpoint.control(job.resolved)
        tracks = [
            self._pictures.track(checkpoint, job, conditioning, image, given, control, self._started)
            for image in job.beginning.images
        ]
        job.ready_at = time.monotonic()
        job.tracks = tuple(tracks)
        job.let_go_of_pictures()
        self.loop.join(tracks)


def _named(demands: Iterable[Demand]) -> set[str]:
    return {demand.group.checkpoint for demand in demands}


def _raise(error: Exception) -> None:
    raise error


def _draining() -> DrainingError:
    return DrainingError("the server is being shut down and takes no new requests; send it to another one")
