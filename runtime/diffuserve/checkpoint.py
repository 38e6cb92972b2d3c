"""One deployed checkpoint as the service uses it: its manifest, conditioning, sampler tables and pictures."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from PIL import Image

from diffuserve.components import ComponentRunner, blank_inputs, cast_inputs, check_rows
from diffuserve.conditioning import Conditioner
from diffuserve.engine import Control, Group
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.first_latents import Given
from diffuserve.images import (
    image_from_pixels,
    levels_from_image,
    mask_from_image,
    pixels_from_image,
    read_image,
    read_pictures,
    resized,
)
from diffuserve.lora.catalog import LoraCatalog
from diffuserve.lora.folder import CheckpointLoras, LoraFolder
from diffuserve.manifest import Deployment, Manifest
from diffuserve.prompts import EmbeddingFolder
from diffuserve.request import (
    DEFAULT_CONTROL_SCALE,
    DEFAULT_STRENGTH,
    MAX_IMAGES,
    MAX_STEPS,
    RANDOM_SEED,
    GenerateRequest,
    ResolvedRequest,
)
from diffuserve.sampling import Trajectory, TrajectoryCompiler
from diffuserve.snapshot import ImageState
from diffuserve.spec import LATENTS, PIXELS, PREVIEW_DECODER, SAMPLE_INPAINT, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.tiles import Side, run_tiled

__all__ = ["MAX_PREVIEW_SIDE", "Checkpoint"]

MAX_PREVIEW_SIDE: Final = 512  # in pixels; larger ones are scaled down

_SEED_BOUND: Final = 2**32  # what the server draws stays readable, and exact in every JSON reader


class Checkpoint:
    """Loads what the loop needs of one checkpoint.

    `embeddings` and `loras` are the deployment's own folders unless they are given.

    Raises OSError or ValueError for a folder that is not whole, or that another version exported.
    """

    def __init__(
        self,
        deployment: Deployment,
        name: str,
        runner: ComponentRunner,
        embeddings: EmbeddingFolder | None = None,
        loras: LoraFolder | None = None,
    ) -> None:
        self.manifest: Manifest = deployment.manifest(name)
        self.name = name
        self._runner = runner
        #: What the UNet is told for requests.
        folder = embeddings or EmbeddingFolder(deployment.embeddings)
        self.condition = Conditioner(self.manifest, deployment.folder(name), runner, folder)
        #: What LoRAs do to it.
        loras = loras or LoraFolder(deployment.loras)
        self.loras = CheckpointLoras(self.manifest, loras)
        self._catalog = LoraCatalog(name, loras, self.loras)
        self._compile = TrajectoryCompiler(self.manifest.scheduler)
        self._tells_masks = self.manifest.conditioning.sample == SAMPLE_INPAINT

    def told(self, until: float) -> dict[str, Any]:
        """What `status` tells of it: what it takes, and what it uses where a request says nothing.

        Files of LoRA that were not looked at before are left for the next time, once the monotonic clock says `until`.
        """
        manifest, conditioning = self.manifest, self.manifest.conditioning
        size = manifest.size
        side = {"minimum": size.min, "default": size.opt, "maximum": size.max, "step": size.step}
        return {
            **self._catalog.told(until),  # first: the samplers take a moment when they are asked for the first time
            "family": manifest.family,
            "prediction_type": self._compile.prediction_type,
            "limits": {
                "width": side,
                "height": side,
                "steps": MAX_STEPS,
                "num_images": MAX_IMAGES,
                "rows": manifest.max_rows(UNET, size.opt, size.opt),
                "clip_skip": conditioning.clip_skip,
                "init_image": VAE_ENCODER in manifest.components,
                "mask_image": VAE_ENCODER in manifest.components,
                "needs_mask": self._tells_masks,
                "control_image": conditioning.control,
                "lora_rank": self.loras.rank,
            },
            "defaults": {
                "width": size.opt,
                "height": size.opt,
                "steps": manifest.steps,
                "guidance_scale": manifest.guidance_scale,
                "sampler": self._compile.default,
            },
            "samplers": self._compile.samplers(manifest.steps),
        }

    def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """Fill in the checkpoint's defaults.

        Raises InvalidArgumentError or UnsupportedError for what this checkpoint cannot do.
        """
        manifest = self.manifest
        width, height = request.width, request.height
        image, mask = self._pictures(request)
        control = self._control_picture(request)
        given = control if image is None else image
        if given is not None:
            width, height = (
                manifest.size.fit(side) if asked is None else asked
                for side, asked in zip(given.size, (width, height), strict=True)
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
            request=replace(request, seed=seed, control_image=b""),
            checkpoint=self.name,
            width=width,
            height=height,
            steps=manifest.steps if request.steps is None else request.steps,
            guidance_scale=guidance,
            sampler=sampler,
            sigma_schedule=schedule,
            seed=seed,
            rows=2 if guided else 1,
            control=None if control is None else resized(control, width, height),
        )
        return self._fitted(self.read(resolved), image, mask)

    def with_pictures(self, resolved: ResolvedRequest) -> ResolvedRequest:
        """The same with the pictures that its request still has. Raises InvalidArgumentError as `resolve` does."""
        return self._fitted(resolved, *read_pictures(resolved.request.init_image, resolved.request.mask_image))

    def _pictures(self, request: GenerateRequest) -> tuple[Image.Image | None, Image.Image | None]:
        """The request's picture and mask, as large as they came."""
        if self._tells_masks and not request.mask_image:
            raise InvalidArgumentError(
                f"{self.name} makes anew what a mask covers of a picture, and mask_image is not given; give init_image "
                "and mask_image, or ask another checkpoint",
                input="mask_image",
            )
        if not request.init_image and request.strength != DEFAULT_STRENGTH:
            raise InvalidArgumentError(
                "strength is given without init_image, the picture that it is about; give one, or leave it out",
                input="strength",
            )
        return read_pictures(request.init_image, request.mask_image)

    def _control_picture(self, request: GenerateRequest) -> Image.Image | None:
        """The picture for the ControlNet, as large as it came."""
        if request.control_image and not self.manifest.conditioning.control:
            raise UnsupportedError(
                f"control_image is given, and {self.name} has no ControlNet; leave it out, or ask a checkpoint that "
                "was exported with one",
                input="control_image",
            )
        if not request.control_image and request.control_scale != DEFAULT_CONTROL_SCALE:
            raise InvalidArgumentError(
                "control_scale is given without control_image, the picture that it is about; give one, or leave it out",
                input="control_scale",
            )
        return read_image("control_image", request.control_image) if request.control_image else None

    def _fitted(
        self, resolved: ResolvedRequest, image: Image.Image | None, mask: Image.Image | None
    ) -> ResolvedRequest:
        """The pictures in the request's size, so that what waits takes no more memory than is needed."""
        size, factor = (resolved.width, resolved.height), self.manifest.latent_scale
        image = None if image is None else resized(image, *size)
        mask = None if mask is None else resized(mask, *size)
        if mask is not None and not bool(_latent_mask(mask, factor).any()):
            raise InvalidArgumentError(
                f"mask_image is black, or has white only in specks of less than {factor} pixels at {size[0]} x "
                f"{size[1]}, which leaves nothing to make; paint what is to be made anew in white",
                input="mask_image",
            )
        return replace(resolved, image=image, mask=mask)

    def read(self, resolved: ResolvedRequest) -> ResolvedRequest:
        """The same with its prompts as the text encoders read them, and what its LoRAs are.

        Raises InvalidArgumentError, NotFoundError or UnsupportedError.
        """
        reading, loras = self.condition.read(resolved), self.loras.read(resolved.request.loras)
        return replace(resolved, reading=reading, embeddings=reading.embeddings, loras=loras)

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
        if resolved.mask is not None and strength == 1:
            strength = None  # as diffusers' inpainting: it begins with noise alone
        return self._compile(resolved.sampler, resolved.steps, resolved.sigma_schedule, resolved.eta, strength)

    def noise(self, resolved: ResolvedRequest, generator: torch.Generator) -> torch.Tensor:
        """Standard noise [C, h, w] float32 of the picture's size, drawn on the CPU as diffusers draws it."""
        return torch.randn((1, *self._latent_shape(resolved)), generator=generator, dtype=torch.float32)[0]

    def check_states(self, resolved: ResolvedRequest, images: Sequence[ImageState]) -> None:
        """Raise InvalidArgumentError where images that were begun elsewhere have other tensors than this one's."""
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
            if image.draws and self._tells_masks != (image.masked is not None and image.masked.noise is None):
                raise InvalidArgumentError(
                    f"the snapshot's mask is not of the kind that {self.name} takes; resume it where it was begun",
                    input="resume",
                )

    def _latent_shape(self, resolved: ResolvedRequest) -> tuple[int, int, int]:
        factor = self.manifest.latent_scale
        return self.manifest.latent_channels, resolved.height // factor, resolved.width // factor

    def encode(self, resolved: ResolvedRequest, *, trace: object | None = None) -> Given:
        """What the request's pictures give its first latents."""
        if resolved.image is None:
            return Given()
        pixels = pixels_from_image(resolved.image)
        if resolved.mask is None:
            return Given(self._moments(pixels, trace))
        mask = _latent_mask(resolved.mask, self.manifest.latent_scale)
        if not self._tells_masks:
            return Given(self._moments(pixels, trace), mask)
        begins_with_it = resolved.request.strength < 1
        masked = self._moments(pixels.masked_fill(mask_from_image(resolved.mask), 0.0), trace)
        return Given(self._moments(pixels, trace) if begins_with_it else None, mask, masked)

    @staticmethod
    def control(resolved: ResolvedRequest) -> Control | None:
        """What the UNet's ControlNet is given for the request's images."""
        if resolved.control is None:
            return None
        return Control(levels_from_image(resolved.control), resolved.request.control_scale)

    def _moments(self, pixels: torch.Tensor, trace: object | None) -> torch.Tensor:
        """Mean and standard deviation [2, C, h, w] float32 of the latents of a picture [3, H, W]."""
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
        sides = {**sides, "rows": rows, "tokens": self.manifest.token_limit, "adapters": 1}
        return lambda: self._runner.run(component, blank_inputs(component, sides))


def _latent_mask(mask: Image.Image, factor: int) -> torch.Tensor:
    """The mask in the latents' size [1, h, w]: of every `factor` pixels the first, as diffusers' interpolation does."""
    return mask_from_image(mask)[:, ::factor, ::factor]
