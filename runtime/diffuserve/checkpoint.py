"""One deployed checkpoint as the service uses it: its manifest, conditioning, sampler tables and pictures."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch
from PIL import Image

from diffuserve.components import ComponentRunner, blank_inputs, cast_inputs, check_rows
from diffuserve.conditioning import Conditioner
from diffuserve.engine import Group
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.images import image_from_pixels, pixels_from_image, read_image
from diffuserve.manifest import Deployment, Manifest
from diffuserve.request import DEFAULT_STRENGTH, RANDOM_SEED, GenerateRequest, ResolvedRequest
from diffuserve.sampling import Trajectory, TrajectoryCompiler
from diffuserve.snapshot import ImageState
from diffuserve.spec import LATENTS, PIXELS, PREVIEW_DECODER, SAMPLE_LATENTS, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.tiles import Side, run_tiled

__all__ = ["MAX_PREVIEW_SIDE", "Checkpoint"]

MAX_PREVIEW_SIDE: Final = 512  # in pixels; larger ones are scaled down

_SEED_BOUND: Final = 2**32  # what the server draws stays readable, and exact in every JSON reader


class Checkpoint:
    """Loads what the loop needs of one checkpoint.

    Raises OSError or ValueError for a folder that is not whole, or that another version exported.
    """

    def __init__(self, deployment: Deployment, name: str, runner: ComponentRunner) -> None:
        self.manifest: Manifest = deployment.manifest(name)
        self.name = name
        self._runner = runner
        #: What the UNet is told for requests.
        self.condition = Conditioner(self.manifest, deployment.folder(name), runner)
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
        return ResolvedRequest(
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
        pixels = pixels_from_image(resolved.image, resolved.width, resolved.height)
        return torch.stack(self._convert(VAE_ENCODER, PIXELS, "moments", pixels, trace).chunk(2))

    def decode(self, latents: torch.Tensor, *, trace: object | None = None) -> torch.Tensor:
        """Pixels [3, H, W] float32 of one image's latents [C, h, w]."""
        return self._convert(VAE_DECODER, LATENTS, PIXELS, latents, trace)

    def preview(self, latents: torch.Tensor, *, trace: object | None = None) -> Image.Image:
        """A small picture of latents [C, h, w].

        Through the preview decoder where there is one, else of one pixel a latent.
        """
        if PREVIEW_DECODER in self.manifest.components:
            pixels = self._convert(PREVIEW_DECODER, LATENTS, PIXELS, latents, trace)
        else:
            weights, bias = torch.tensor(self.manifest.colours.weights), torch.tensor(self.manifest.colours.bias)
            pixels = torch.tensordot(weights, latents.to("cpu", torch.float32), dims=1) + bias[:, None, None]
        image = image_from_pixels(pixels)
        image.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
        return image

    def _convert(self, name: str, source: str, result: str, tensor: torch.Tensor, trace: object | None) -> torch.Tensor:
        """One of the autoencoder's components on one picture [C, H, W], in tiles where it takes no more.

        `source` and `result` are its input and its output.
        """
        component, factor = self.manifest.components[name], self.manifest.latent_scale
        scales = (factor, 1) if source == PIXELS else (1, factor)
        longest = self.manifest.vae_size.max // factor
        sides = Side.of(tensor.shape[1] // scales[0], longest), Side.of(tensor.shape[2] // scales[0], longest)

        def run(tiles: torch.Tensor) -> torch.Tensor:
            inputs = cast_inputs(component, {source: tiles.contiguous()})
            return check_rows(component, self._runner.run(component, inputs, trace=trace)[result], len(tiles))

        rows = self.manifest.max_rows(name, sides[1].tile * factor, sides[0].tile * factor)
        return run_tiled(tensor, sides, max(1, rows), scales, run)

    def trial(self, group: Group, rows: int) -> Callable[[], object]:
        """A UNet call of that many rows of nothing, for measuring what it costs."""
        component = self.manifest.components[UNET]
        sides = self.manifest.sides(group.width, group.height)
        sides = {**sides, "rows": rows, "tokens": self.manifest.token_limit}
        return lambda: self._runner.run(component, blank_inputs(component, sides))
