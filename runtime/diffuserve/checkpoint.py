"""One deployed checkpoint as the service uses it: its manifest, conditioning, sampler tables and pictures."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch

from diffuserve.components import ComponentRunner, blank_inputs, cast_inputs, check_rows
from diffuserve.conditioning import Conditioner
from diffuserve.engine import Group
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.images import pixels_from_image, read_image
from diffuserve.manifest import Deployment, Manifest
from diffuserve.prompts import EmbeddingFolder
from diffuserve.request import DEFAULT_STRENGTH, RANDOM_SEED, GenerateRequest, ResolvedRequest
from diffuserve.sampling import Trajectory, TrajectoryCompiler
from diffuserve.snapshot import ImageState
from diffuserve.spec import LATENTS, PIXELS, SAMPLE_LATENTS, UNET, VAE_DECODER, VAE_ENCODER

__all__ = ["Checkpoint"]

_SEED_BOUND: Final = 2**32  # what the server draws stays readable, and exact in every JSON reader


class Checkpoint:
    """Loads what the loop needs of one checkpoint. `embeddings` is the deployment's own folder unless it is given.

    Raises OSError or ValueError for a folder that is not whole, or that another version exported.
    """

    def __init__(
        self, deployment: Deployment, name: str, runner: ComponentRunner, embeddings: EmbeddingFolder | None = None
    ) -> None:
        self.manifest: Manifest = deployment.manifest(name)
        self.name = name
        self._runner = runner
        #: What the UNet is told for requests.
        folder = embeddings or EmbeddingFolder(deployment.embeddings)
        self.condition = Conditioner(self.manifest, deployment.folder(name), runner, folder)
        self._compile = TrajectoryCompiler(self.manifest.scheduler)

    def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """Fill in the checkpoint's defaults.

        Raises InvalidArgumentError or UnsupportedError for what this checkpoint cannot do.
        """
        manifest = self.manifest
        if manifest.conditioning.sample != SAMPLE_LATENTS:
            raise UnsupportedError(
                f"{self.name} paints what a mask leaves out of a picture, and masks are not supported by this server "
                "yet; ask another checkpoint",
                input="checkpoint",
            )
        width, height = request.width, request.height
        image = read_image("init_image", request.init_image) if request.init_image else None
        if image is None and request.strength != DEFAULT_STRENGTH:
            raise InvalidArgumentError(
                "strength is given without init_image, the picture that it is about; give one, or leave it out",
                input="strength",
            )
        if image is not None:
            width, height = (
                manifest.size.fit(side) if asked is None else asked
                for side, asked in zip(image.size, (width, height), strict=True)
            )
        width = manifest.size.opt if width is None else width
        height = manifest.size.opt if height is None else height
        manifest.size.check("width", width)
        manifest.size.check("height", height)
        sampler, schedule = self._compile.choose(request.sampler, request.sigma_schedule, request.eta)
        guidance = manifest.guidance_scale if request.guidance_scale is None else request.guidance_scale
        # As diffusers: a scale that the UNet is told takes the place of the second row.
        guided = guidance > 1 and not manifest.conditioning.guidance_embedding
        seed = secrets.randbelow(_SEED_BOUND) if request.seed == RANDOM_SEED else request.seed
        self._check_clip_skip(request.clip_skip)
        resolved = ResolvedRequest(
            request=replace(request, seed=seed),
            checkpoint=self.name,
            width=width,
            height=height,
            steps=manifest.steps if request.steps is None else request.steps,
            guidance_scale=guidance,
            sampler=sampler,
            sigma_schedule=schedule,
            seed=seed,
            rows=2 if guided else 1,
            image=image,
        )
        return self.read(resolved)

    def read(self, resolved: ResolvedRequest) -> ResolvedRequest:
        """The same with its prompts as the text encoders read them. Raises InvalidArgumentError or UnsupportedError."""
        reading = self.condition.read(resolved)
        return replace(resolved, reading=reading, embeddings=reading.embeddings)

    def _check_clip_skip(self, asked: int) -> None:
        most = self.manifest.conditioning.clip_skip
        if asked > most:
            raise InvalidArgumentError(
                f"clip_skip is {asked}, and the text encoders of {self.name} have {most} layers that can be left out; "
                f"ask for at most {most}",
                input="clip_skip",
                value=asked,
                maximum=most,
            )

    def trajectory(self, resolved: ResolvedRequest) -> Trajectory:
        """The table of the request's sampler. Raises CompileError where there is none at these steps."""
        strength = resolved.request.strength if resolved.image is not None else None
        return self._compile(resolved.sampler, resolved.steps, resolved.sigma_schedule, resolved.eta, strength)

    def noise(self, resolved: ResolvedRequest, generator: torch.Generator) -> torch.Tensor:
        """Standard noise [C, h, w] float32 of the picture's size, drawn on the CPU as diffusers draws it."""
        return torch.randn((1, *self._latent_shape(resolved)), generator=generator, dtype=torch.float32)[0]

    def check_states(self, resolved: ResolvedRequest, images: Sequence[ImageState]) -> None:
        """Raise InvalidArgumentError where images that were begun elsewhere have other latents than this one's."""
        self.manifest.size.check("width", resolved.width)
        self.manifest.size.check("height", resolved.height)
        shape = self._latent_shape(resolved)
        for image in images:
            if image.draws and tuple(image.latents.shape) != shape:
                raise InvalidArgumentError(
                    f"the snapshot's latents have the shape {list(image.latents.shape)}, and {self.name} has "
                    f"{list(shape)} at {resolved.width} x {resolved.height}",
                    input="resume",
                )

    def _latent_shape(self, resolved: ResolvedRequest) -> tuple[int, int, int]:
        factor = self.manifest.latent_scale
        return self.manifest.latent_channels, resolved.height // factor, resolved.width // factor

    def encode(self, resolved: ResolvedRequest, *, trace: object | None = None) -> torch.Tensor:
        """Mean and standard deviation [2, C, h, w] float32 of the latents of the request's picture."""
        component = self.manifest.components[VAE_ENCODER]
        pixels = pixels_from_image(resolved.image, resolved.width, resolved.height)
        inputs = cast_inputs(component, {PIXELS: pixels[None].contiguous()})
        moments = check_rows(component, self._runner.run(component, inputs, trace=trace)["moments"], 1)
        return torch.stack(moments[0].to(device="cpu", dtype=torch.float32).chunk(2))

    def decode(self, latents: torch.Tensor, *, trace: object | None = None) -> torch.Tensor:
        """Pixels [3, H, W] of one image's latents [C, h, w]."""
        component = self.manifest.components[VAE_DECODER]
        inputs = cast_inputs(component, {LATENTS: latents[None].contiguous()})
        pixels = self._runner.run(component, inputs, trace=trace)[PIXELS]
        return check_rows(component, pixels, 1)[0]

    def trial(self, group: Group, rows: int) -> Callable[[], object]:
        """A UNet call of that many rows of nothing, for measuring what it costs."""
        component = self.manifest.components[UNET]
        sides = self.manifest.sides(group.width, group.height)
        sides = {**sides, "rows": rows, "tokens": self.manifest.token_limit}
        return lambda: self._runner.run(component, blank_inputs(component, sides))
