"""One deployed checkpoint as the service uses it: its manifest, tokenizer and sampler tables."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from diffuserve.components import ComponentRunner, cast_inputs, check_rows
from diffuserve.engine import HIDDEN_STATES, Group
from diffuserve.manifest import Deployment, Manifest
from diffuserve.prompt import Prompt, PromptTokenizer
from diffuserve.request import RANDOM_SEED, GenerateRequest
from diffuserve.sampling import Trajectory, TrajectoryCompiler
from diffuserve.spec import LATENTS, PIXELS, TEXT_ENCODER, UNET, VAE_DECODER

__all__ = ["Checkpoint", "ResolvedRequest"]

_SEED_BOUND: Final = 2**32  # what the server draws stays readable, and exact in every JSON reader


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left to default: what `info` reports, and what makes the same picture again."""

    request: GenerateRequest
    checkpoint: str
    width: int
    height: int
    guidance_scale: float
    sampler: str
    sigma_schedule: str | None
    seed: int

    @property
    def eta(self) -> float:
        return self.request.eta

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1  # as diffusers

    def parameters(self, index: int) -> dict[str, object]:
        """Every parameter that made image `index`."""
        return {
            **self.request.parameters(),
            "checkpoint": self.checkpoint,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "sigma_schedule": self.sigma_schedule,
            "seed": self.seed + index,
            "num_images": 1,
        }


class Checkpoint:
    """Loads what the loop needs of one checkpoint. Raises OSError or ValueError for a folder that is not whole."""

    def __init__(self, deployment: Deployment, name: str, runner: ComponentRunner) -> None:
        self.manifest: Manifest = deployment.manifest(name)
        self.name = name
        self._runner = runner
        self._tokenizer = PromptTokenizer(deployment.folder(name) / "tokenizer.json", self.manifest.token_limit)
        self._compile = TrajectoryCompiler(self.manifest.scheduler)

    def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """Fill in the checkpoint's defaults.

        Raises InvalidArgumentError or UnsupportedError for what this checkpoint cannot do.
        """
        manifest = self.manifest
        width, height = request.width, request.height
        width = manifest.size.opt if width is None else width
        height = manifest.size.opt if height is None else height
        manifest.size.check("width", width)
        manifest.size.check("height", height)
        sampler, schedule = self._compile.choose(request.sampler, request.sigma_schedule, request.eta)
        guidance = manifest.guidance_scale if request.guidance_scale is None else request.guidance_scale
        seed = secrets.randbelow(_SEED_BOUND) if request.seed == RANDOM_SEED else request.seed
        return ResolvedRequest(
            request=replace(request, seed=seed),
            checkpoint=self.name,
            width=width,
            height=height,
            guidance_scale=guidance,
            sampler=sampler,
            sigma_schedule=schedule,
            seed=seed,
        )

    def trajectory(self, resolved: ResolvedRequest) -> Trajectory:
        """The table of the request's sampler. Raises CompileError where there is none at these steps."""
        return self._compile(resolved.sampler, resolved.request.steps, resolved.sigma_schedule, resolved.eta)

    def encode_prompts(
        self, prompts: list[str], trace: object | None = None
    ) -> tuple[dict[str, torch.Tensor], list[Prompt]]:
        """What the UNet is told, by input name [len(prompts), ...], and the prompts as they were read."""
        read = [self._tokenizer(prompt) for prompt in prompts]
        rows: dict[tuple[int, ...], int] = {}  # each prompt once: many requests share their negative prompt
        row_of = [rows.setdefault(tuple(one.ids[0].tolist()), len(rows)) for one in read]
        component = self.manifest.components[TEXT_ENCODER]
        ids = torch.tensor(list(rows), dtype=torch.int32)
        outputs = self._runner.run(component, {"input_ids": ids}, trace=trace)
        # The rows are copied: they are kept for as long as the request runs, and the component's memory is lent.
        hidden_states = check_rows(component, outputs["hidden_states"], len(rows))[row_of].to(torch.float32)
        return {HIDDEN_STATES: hidden_states}, read

    def first_latents(self, resolved: ResolvedRequest, generator: torch.Generator, scale: float) -> torch.Tensor:
        """Seeded noise [C, h, w] float32, drawn on the CPU as diffusers draws it, times the sampler's first scale."""
        factor = self.manifest.latent_scale
        shape = (1, self.manifest.latent_channels, resolved.height // factor, resolved.width // factor)
        return torch.randn(shape, generator=generator, dtype=torch.float32)[0] * scale

    def decode(self, latents: torch.Tensor, *, trace: object | None = None) -> torch.Tensor:
        """Pixels [3, H, W] of one image's latents [C, h, w]."""
        component = self.manifest.components[VAE_DECODER]
        inputs = cast_inputs(component, {LATENTS: latents[None].contiguous()})
        pixels = self._runner.run(component, inputs, trace=trace)[PIXELS]
        return check_rows(component, pixels, 1)[0]

    def trial(self, group: Group, rows: int) -> Callable[[], object]:
        """A UNet call of that many rows of nothing, for measuring what it costs."""
        component = self.manifest.components[UNET]
        width = next((one.shape[-1] for one in component.inputs if one.name == HIDDEN_STATES), 1)
        factor = self.manifest.latent_scale

        def run() -> object:
            inputs = {
                "sample": torch.zeros(
                    rows, self.manifest.latent_channels, group.height // factor, group.width // factor
                ),
                "timestep": torch.full((rows,), 500.0),
                HIDDEN_STATES: torch.zeros(rows, self.manifest.token_limit, int(width)),
            }
            return self._runner.run(component, cast_inputs(component, inputs))

        return run
