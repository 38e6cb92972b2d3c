"""Images on their way through the loop, and pictures of what it gives, made on workers beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch

from diffuserve.checkpoint import Checkpoint
from diffuserve.engine import Control, Group, Track
from diffuserve.errors import CancelledError
from diffuserve.first_latents import Given, begun
from diffuserve.images import encode_image, image_from_pixels
from diffuserve.job import Job, shutting_down
from diffuserve.previews import Previews
from diffuserve.snapshot import ImageState
from diffuserve.workers import Workers

__all__ = ["Pictures"]

_FINISH_WORKERS: Final = 2  # one picture's file is written while the next is decoded


class Pictures:
    """Makes the loop's tracks, whose latents come back to be decoded for their jobs."""

    def __init__(self) -> None:
        self._finish = Workers(_FINISH_WORKERS, "finish")
        self._previews = Previews()

    def stalled(self) -> float:
        """Seconds that the picture that has been under way for longest has taken so far; 0 where none is."""
        return self._finish.stalled()

    def close(self) -> None:
        """Make the pictures whose latents are there, and end."""
        self._finish.close()
        self._previews.close()

    def track(
        self,
        checkpoint: Checkpoint,
        job: Job,
        conditioning: Mapping[str, torch.Tensor],
        image: ImageState,
        given: Given,
        control: Control | None,
        on_start: Callable[[], None],
    ) -> Track:
        """One image of a request, for the loop. `on_start` is called at its first step."""
        resolved, trajectory = job.resolved, job.beginning.remaining(image)
        generator = torch.Generator().manual_seed(resolved.seed + image.index)
        draw = partial(checkpoint.noise, resolved, generator)
        for _ in range(image.draws):
            draw()
        state = image if image.draws else begun(image, trajectory, given, draw)

        def on_latents(latents: torch.Tensor) -> None:
            job.stepped_at = time.monotonic()
            make = partial(self._picture, checkpoint, job, track, image.index, latents)
            if not self._finish.submit(job.urgency, partial(job.guarded, make)):
                job.fail(shutting_down())

        def on_predicted(done: int, latents: torch.Tensor) -> None:
            make = partial(self._preview, checkpoint, job, image.index, done, latents)
            self._previews.offer(track, job.urgency, make)

        def on_suspend(latents: torch.Tensor, history: torch.Tensor) -> None:
            draws = state.draws + int(trajectory.draws[: track.evaluation].sum())
            evaluation, steps = state.evaluation + track.evaluation, track.steps_done(track.evaluation)
            job.suspend(ImageState(state.index, evaluation, steps, draws, latents, history, state.masked))

        track = Track(
            group=Group(checkpoint.name, resolved.height, resolved.width),
            trajectory=trajectory,
            guidance_scale=resolved.guidance_scale,
            guidance_rescale=resolved.request.guidance_rescale,
            latents=state.latents,
            history=state.history,
            steps_before=state.steps,
            predict_every=resolved.request.preview_every,
            masked=state.masked,
            control=control,
            conditioning=conditioning,
            adapter=resolved.adapter,
            chunks=resolved.reading.chunks,
            generator=generator,
            priority=resolved.request.priority,
            tag=resolved.request.client_tag,
            deadline=job.deadline,
            trace=job.trace,
            on_start=on_start,
            on_step=lambda done: job.step(track, image.index, done),
            on_predicted=on_predicted,
            on_latents=on_latents,
            on_error=job.fail,
            on_suspend=on_suspend,
            is_cancelled=job.is_cancelled,
        )
        return track

    def _picture(self, checkpoint: Checkpoint, job: Job, track: Track, index: int, latents: torch.Tensor) -> None:
        """VAE decoding and the image file. Raises CancelledError where nobody waits for them."""
        if job.is_cancelled():
            raise CancelledError("the client cancelled")
        request = job.resolved.request
        image = image_from_pixels(checkpoint.decode(latents, trace=job.trace))
        job.image(track, index, encode_image(image, request.image_format))

    @staticmethod
    def _preview(checkpoint: Checkpoint, job: Job, index: int, done: int, latents: torch.Tensor) -> None:
        """The small picture of predicted latents and its file, unless the image's own was faster."""
        if job.wants_preview(index):
            image = checkpoint.preview(latents, trace=job.trace)
            job.preview(index, done, image.size, encode_image(image, job.resolved.request.image_format))
