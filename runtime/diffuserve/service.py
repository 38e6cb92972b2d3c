"""The service: a request in, events out.

    submit -> admission -> text encoders and first latents -> the denoising loop -> VAE and image file -> reply

The loop's thread only steps: encoding and decoding run on workers beside it. Whatever fails on the way, the
request's reply gets exactly one final answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import torch

from diffuserve.checkpoint import Checkpoint, ResolvedRequest
from diffuserve.components import ComponentRunner
from diffuserve.engine import DenoiseLoop, LoopCheckpoint, StepPolicy, Track
from diffuserve.errors import CancelledError, DiffuserveError, InternalError, NotFoundError
from diffuserve.images import encode_image, image_from_pixels
from diffuserve.manifest import Deployment
from diffuserve.request import Event, GenerateRequest
from diffuserve.spec import UNET

__all__ = ["DiffusionService", "Reply"]

_log: Final = logging.getLogger(__name__)

_FINISH_WORKERS: Final = 2  # one picture's file is written while the next is decoded


class Reply(Protocol):
    """One request's way back to its client. Called from several threads, one call at a time."""

    def send(self, event: Event, *, final: bool) -> None: ...

    def fail(self, error: DiffuserveError) -> None: ...

    def is_cancelled(self) -> bool: ...


class _Job:
    """One request on its way: counts its images, and answers the reply's end exactly once."""

    def __init__(self, resolved: ResolvedRequest, reply: Reply, on_end: Callable[[], None]) -> None:
        self.resolved, self._reply, self._on_end = resolved, reply, on_end
        self.accepted_at = time.monotonic()
        self.tokens_cut = 0
        self._left = resolved.request.num_images
        self._ended = False
        self._lock = threading.Lock()

    def is_cancelled(self) -> bool:
        return self._ended or self._reply.is_cancelled()

    def step(self, track: Track, index: int, done: int, finished: bool) -> None:
        every = self.resolved.request.progress_every
        if every and done % every == 0 and not finished:
            info = {"joined_at_step": track.joined_at_step}
            self._send(self._event("progress", index, done, b"", info))

    def image(self, index: int, data: bytes, info: dict[str, Any]) -> None:
        self._send(self._event("image", index, self.resolved.request.steps, data, info), image=True)

    def fail(self, error: BaseException) -> None:
        ours = error if isinstance(error, DiffuserveError) else InternalError(f"a bug in the server: {error!r}")
        with self._lock:
            if self._ended:
                return
            self._ended = True
            try:
                self._reply.fail(ours)
            finally:
                self._on_end()

    def _event(self, kind: Any, index: int, step: int, data: bytes, info: dict[str, Any]) -> Event:
        resolved = self.resolved
        return Event(
            kind=kind,
            index=index,
            step=step,
            steps=resolved.request.steps,
            seed=resolved.seed + index,
            data=data,
            info=info,
        )

    def _send(self, event: Event, image: bool = False) -> None:
        with self._lock:
            if self._ended:
                return
            self._left -= image
            final = self._left == 0
            if final:
                self._ended = True
            try:
                self._reply.send(event, final=final)
            finally:
                if final:
                    self._on_end()


class DiffusionService:
    """Serves the checkpoints of one deployment through one denoising loop."""

    def __init__(self, deployment: Deployment, runner: ComponentRunner, policy: StepPolicy | None = None) -> None:
        self._checkpoints = {name: Checkpoint(deployment, name, runner) for name in deployment.checkpoints}
        self._default = deployment.checkpoints[0]
        max_rows = min(checkpoint.manifest.rows.max for checkpoint in self._checkpoints.values())
        self._policy = policy or StepPolicy(max_rows=max_rows)
        units = {name: LoopCheckpoint(one.manifest.components[UNET]) for name, one in self._checkpoints.items()}
        self.loop = DenoiseLoop(runner, self._policy, units)
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._finish = ThreadPoolExecutor(_FINISH_WORKERS, "finish")
        self._jobs = 0
        self._lock = threading.Lock()

    def submit(self, request: GenerateRequest, reply: Reply) -> None:
        """Accept a request; its events follow on `reply`.

        Raises DiffuserveError for a request that is not accepted: then nothing is sent on `reply`.
        """
        checkpoint = self._checkpoint(request.checkpoint)
        resolved = checkpoint.resolve(request)
        with self._lock:
            self._policy.admit(self._jobs)
            self._jobs += 1
        job = _Job(resolved, reply, self._forget)
        self._run_on(self._prepare, job, lambda: self._start(checkpoint, job))

    def close(self) -> None:
        """Stop stepping. Requests under way end with an error."""
        self._prepare.shutdown(wait=True)
        self.loop.close()
        self._finish.shutdown(wait=True)

    def _checkpoint(self, name: str | None) -> Checkpoint:
        checkpoint = self._checkpoints.get(name or self._default)
        if checkpoint is None:
            raise NotFoundError(
                f"checkpoint {(name or '')[:64]!r} is not deployed; deployed are {', '.join(self._checkpoints)}",
                input="checkpoint",
                deployed=tuple(self._checkpoints),
            )
        return checkpoint

    def _forget(self) -> None:
        with self._lock:
            self._jobs -= 1

    @staticmethod
    def _run_on(workers: ThreadPoolExecutor, job: _Job, act: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                act()
            except Exception as error:
                if not isinstance(error, DiffuserveError):
                    _log.exception("a request failed")
                job.fail(error)

        try:
            workers.submit(guarded)
        except RuntimeError as error:  # the workers have been shut down
            job.fail(CancelledError(f"the server is shutting down ({error})"))

    def _start(self, checkpoint: Checkpoint, job: _Job) -> None:
        """Text encoding and first latents; then the request's images join the loop together."""
        if job.is_cancelled():
            raise CancelledError("the client cancelled")
        resolved, request = job.resolved, job.resolved.request
        prompts = [request.prompt, request.negative_prompt] if resolved.guided else [request.prompt]
        hidden_states, read = checkpoint.encode_prompts(prompts)
        job.tokens_cut = read[0].tokens_cut
        self.loop.join([self._track(checkpoint, job, hidden_states, index) for index in range(request.num_images)])

    def _track(self, checkpoint: Checkpoint, job: _Job, hidden_states: torch.Tensor, index: int) -> Track:
        resolved = job.resolved
        trajectory = checkpoint.trajectory(resolved.sampler, resolved.request.steps)
        generator = torch.Generator().manual_seed(resolved.seed + index)

        def on_latents(latents: torch.Tensor) -> None:
            self._run_on(self._finish, job, lambda: self._picture(checkpoint, job, track, index, latents))

        track = Track(
            group=(checkpoint.name, resolved.height, resolved.width),
            trajectory=trajectory,
            guidance_scale=resolved.guidance_scale,
            latents=checkpoint.first_latents(resolved, generator, trajectory.initial_scale),
            hidden_states=hidden_states,
            generator=generator,
            on_step=lambda done: job.step(track, index, done, track.is_done),
            on_latents=on_latents,
            on_error=job.fail,
            is_cancelled=job.is_cancelled,
        )
        return track

    def _picture(self, checkpoint: Checkpoint, job: _Job, track: Track, index: int, latents: torch.Tensor) -> None:
        """VAE decoding and the image file."""
        request = job.resolved.request
        image = image_from_pixels(checkpoint.decode(latents))
        data = encode_image(image, request.image_format, request.image_encoding)
        info = {
            **job.resolved.parameters(index),
            "joined_at_step": track.joined_at_step,
            "queued_s": round(track.started_at - job.accepted_at, 4),
            "run_s": round(time.monotonic() - track.started_at, 4),
            "prompt_tokens_cut": job.tokens_cut,
        }
        job.image(index, data, info)
