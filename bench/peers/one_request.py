"""One request's way over the exported components, as the peers that run loops of their own need it.

Tokenizer, sampler tables and pictures are the service's, so that a peer pays no more than the service does around
its engines: a table's step costs less than diffusers' scheduler.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from diffuserve.images import image_from_pixels
from diffuserve.manifest import Deployment
from diffuserve.prompts import PromptTokenizer
from diffuserve.prompts.windows import Token
from diffuserve.request import GenerateRequest
from diffuserve.sampling import HISTORY, Trajectory, TrajectoryCompiler
from diffuserve.spec import CLIP_SKIP, EMBEDDINGS, INPUT_IDS, TEXT_ENCODER

__all__ = ["Array", "OneRequest", "denoise"]

Array = npt.NDArray[Any]

#: The UNet's inputs out, its output in, and in the end the latents [1, C, h, w].
Loop = Generator[dict[str, Array], Array, Array]


class OneRequest:
    """The steps around the engines, for the first checkpoint of a deployment. Safe to call from several threads."""

    def __init__(self, deployment: Deployment) -> None:
        name = deployment.checkpoints[0]
        self.manifest = deployment.manifest(name)
        self._tokenizer = PromptTokenizer(deployment.folder(name) / "tokenizer.json", self.manifest.token_limit)
        embeddings = next(one for one in self.manifest.components[TEXT_ENCODER].inputs if one.name == EMBEDDINGS)
        self._width = int(embeddings.shape[-1])
        self._compile = TrajectoryCompiler(self.manifest.scheduler)

    def text_inputs(self, request: GenerateRequest) -> dict[str, Array]:
        """The text encoder's inputs for the prompt, then, with guidance, the negative prompt: one window each."""
        guided = (request.guidance_scale or 0) > 1
        prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        windows = [self._tokenizer.window(list(map(Token, self._tokenizer.ids(one)))) for one in prompts]
        return {
            INPUT_IDS: np.array([one.ids for one in windows], dtype=np.int32),
            CLIP_SKIP: np.zeros(len(windows), dtype=np.int32),
            EMBEDDINGS: np.zeros((1, self._width), dtype=np.float32),
        }

    def steps(self, request: GenerateRequest) -> int:
        return request.steps or self.manifest.steps

    def loop(self, request: GenerateRequest, hidden_states: Array) -> Loop:
        """The denoising loop of the request, from its seed's noise."""
        trajectory = self._compile(request.sampler, self.steps(request))
        side = self.manifest.size.opt // self.manifest.latent_scale
        shape = (1, self.manifest.latent_channels, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)).numpy()
        first = noise * np.float32(trajectory.initial_scale)
        return denoise(trajectory, first, hidden_states, np.float32(request.guidance_scale or 0))

    @staticmethod
    def picture(pixels: Array) -> Image.Image:
        return image_from_pixels(torch.from_numpy(pixels[0]))


def denoise(trajectory: Trajectory, x: Array, hidden_states: Array, guidance: np.float32) -> Loop:
    """The update of Trajectory's docstring, for one image and samplers that draw no noise on the way."""
    if trajectory.draws.any():
        raise ValueError(f"{trajectory.sampler} draws noise on its way, which this loop does not do")
    rows = len(hidden_states)
    history = [np.zeros_like(x)] * HISTORY
    for timestep, numbers, remember in zip(
        trajectory.timestep, trajectory.coefficients(), trajectory.remember, strict=True
    ):
        scale, p, q, a, _, b0, *b = numbers
        output = yield {
            "sample": np.repeat(x * scale, rows, axis=0),
            "timestep": np.full(rows, timestep, dtype=np.float32),
            "encoder_hidden_states": hidden_states,
        }
        conditional, unconditional = output[:1], output[-1:]  # the same row where there is no guidance
        m = unconditional + guidance * (conditional - unconditional)
        u = p * x + q * m
        x = a * x + b0 * u + sum(factor * past for factor, past in zip(b, history, strict=True))
        if remember:
            history = [u, *history[:-1]]
    return x
