"""Train a ControlNet for the shapes checkpoint: a silhouette says where which shape is, and how large.

One command, seeded, and resumable. The checkpoint itself is not changed.

    PYTHONPATH=checkpoints python -m shapes_recipe.control --out checkpoints/shapes-control
    PYTHONPATH=checkpoints python -m shapes_recipe.control --out checkpoints/shapes-control --evaluate 100
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from shapes_recipe.train import SCHEDULER, SEED, Trainer
from shapes_recipe.world import COLOURS, SHAPES, Scene, coverage

__all__ = ["Posed", "agreement", "posed", "silhouette"]

Pixels = npt.NDArray[np.float32]

SIZE: Final = 64
PICTURES: Final = 8000
STEPS: Final = 500
FINISH: Final = 100
BATCH: Final = 24
CAPTION_DROPOUT: Final = 0.1
#: Of captions: that speak of another size and shape than the silhouette, which then counts.
CONTRADICTED: Final = 0.5
RADII: Final = (0.3, 0.7)
CENTRE: Final = 0.3
#: The radius from which on a caption says large.
LARGE: Final = 0.5
EMBEDDING: Final = (16, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Posed:
    """A scene whose shape has a place and a radius of its own, as `world.coverage` takes them."""

    scene: Scene
    radius: float
    centre: tuple[float, float]

    def cover(self, width: int, height: int) -> Pixels:
        """The share of each pixel that the shape covers, [height, width] in 0 to 1."""
        return coverage(self.scene.shape, self.radius, self.centre, width, height)

    def picture(self, width: int, height: int) -> Pixels:
        """[height, width, 3] in 0 to 1."""
        alpha = self.cover(width, height)[..., None]
        foreground, background = (
            np.array(COLOURS[one], np.float32) / 255 for one in (self.scene.colour, self.scene.background)
        )
        return (alpha * foreground + (1 - alpha) * background).astype(np.float32)


def posed(rng: np.random.Generator) -> Posed:
    """Any shape of any two colours anywhere; its caption says of its size what comes nearest."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    radius = float(rng.uniform(*RADII))
    scene = Scene("large" if radius >= LARGE else "small", str(colour), str(rng.choice(SHAPES)), str(background))
    return Posed(scene, radius, (float(rng.uniform(-CENTRE, CENTRE)), float(rng.uniform(-CENTRE, CENTRE))))


def silhouette(one: Posed, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """The control: white where the shape is, on black."""
    levels = np.round(one.cover(width, height) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def agreement(image: Image.Image, one: Posed, scene: Scene | None = None) -> float:
    """How well the shape in a picture covers the silhouette: the intersection of both over their union.

    A pixel is the shape's where its colour is nearer to the shape's of `scene` than to the background's.
    """
    scene = scene or one.scene
    pixels = np.asarray(image.convert("RGB"), np.float32)
    to_shape, to_background = (
        np.linalg.norm(pixels - np.array(COLOURS[colour], np.float32), axis=-1)
        for colour in (scene.colour, scene.background)
    )
    found, wanted = to_shape < to_background, one.cover(*image.size) > 0.5
    return float((found & wanted).sum() / max(1, (found | wanted).sum()))


def contradicted(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same colours with any size and shape."""
    return Scene(str(rng.choice(["small", "large"])), scene.colour, str(rng.choice(SHAPES)), scene.background)


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """As Zhang et al. 2023: a copy of the UNet's encoder, whose residuals begin as zeros."""
    torch.manual_seed(SEED)
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)


@torch.no_grad()
def training_set(checkpoint: Path, path: Path) -> dict[str, Any]:
    """`latents` [n,4,8,8] scaled, `controls` uint8 [n,64,64], and two `captions` of each; kept in `path`."""
    if not path.exists():
        rng = np.random.default_rng([SEED, 7])
        drawn = [posed(rng) for _ in range(PICTURES)]
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
        pictures = torch.from_numpy(np.stack([one.picture(SIZE, SIZE) for one in drawn])).permute(0, 3, 1, 2) * 2 - 1
        latents = [vae.encode(part).latent_dist.mode() for part in pictures.split(100)]
        captions = [[one.scene.caption, contradicted(one.scene, rng).caption] for one in drawn]
        torch.save(
            {
                "latents": torch.cat(latents) * vae.config.scaling_factor,
                "controls": torch.from_numpy(np.stack([np.asarray(silhouette(one).convert("L")) for one in drawn])),
                "captions": captions,
            },
            path,
        )
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


class Controlled(nn.Module):
    """A frozen UNet and the ControlNet that learns: noisy latents, timesteps, text and control -> noise."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet
        # Not a submodule: the trainer optimises, averages and keeps all parameters that it finds.
        self.frozen = [unet.requires_grad_(False).eval()]

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, hidden: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        down, mid = self.controlnet(sample, timestep, hidden, control, return_dict=False)
        output: torch.Tensor = self.frozen[0](
            sample,
            timestep,
            hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Controlled:
        """For the trainer's average, which needs no second copy of the frozen UNet."""
        copied = ControlNetModel.from_config(self.controlnet.config)
        copied.load_state_dict(self.controlnet.state_dict())
        return Controlled(self.frozen[0], copied)


def train(checkpoint: Path, work: Path) -> ControlNetModel:
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    data = training_set(checkpoint, work / "silhouettes.pt")
    schedule = DDPMScheduler(**SCHEDULER)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    model = Controlled(unet, make_controlnet(unet))

    @torch.no_grad()
    def encoded(captions: list[str]) -> torch.Tensor:
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        hidden: torch.Tensor = text_encoder(ids).last_hidden_state
        return hidden

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([SEED, 8, step])
        index = rng.integers(PICTURES, size=BATCH)
        which = (rng.random(BATCH) < CONTRADICTED).astype(int)
        dropped = rng.random(BATCH) < CAPTION_DROPOUT
        captions = ["" if drop else data["captions"][i][w] for i, w, drop in zip(index, which, dropped, strict=True)]
        latents = data["latents"][torch.from_numpy(index)]
        control = data["controls"][torch.from_numpy(index)].float().div(255)[:, None].expand(-1, 3, -1, -1)
        timestep = torch.from_numpy(((np.arange(BATCH) + rng.random(BATCH)) / BATCH * 1000).astype(np.int64))
        noise = torch.randn_like(latents)
        output = model(schedule.add_noise(latents, noise, timestep), timestep, encoded(captions), control)
        # Min-SNR weighting, as the UNet was trained with.
        weight = (snr[timestep].clamp(max=5.0) / snr[timestep]).clamp(min=0.05)
        return (weight * F.mse_loss(output, noise, reduction="none").mean(dim=(1, 2, 3))).mean()

    trained = Trainer(model, work / "control.pt", STEPS, 5e-4, ema=0.99, finish=FINISH).run("ControlNet", loss_at)
    assert isinstance(trained, Controlled)
    return trained.controlnet


def evaluate(checkpoint: Path, folder: Path, count: int) -> dict[str, float]:
    """Mean agreement of pictures with their silhouettes: guided by the caption that fits, by one that does not, and
    without the control.
    """
    single = torch.float32
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        checkpoint,
        controlnet=ControlNetModel.from_pretrained(folder, torch_dtype=single),
        torch_dtype=single,
        safety_checker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([SEED, 9])
    kinds: dict[str, list[float]] = {"with its caption": [], "with another caption": [], "without control": []}
    for seed in range(count):
        one = posed(rng)
        other = contradicted(one.scene, rng)
        for kind, scene in zip(kinds, (one.scene, other, one.scene), strict=True):
            image = pipeline(
                scene.caption,
                image=silhouette(one),
                width=SIZE,
                height=SIZE,
                num_inference_steps=20,
                guidance_scale=2.0,
                controlnet_conditioning_scale=0.0 if kind == "without control" else 1.0,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            kinds[kind].append(agreement(image, one))
    return {kind: float(np.mean(values)) for kind, values in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shapes"), help="whose ControlNet it is")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes-control"), help="the folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="states to resume from")
    parser.add_argument("--evaluate", type=int, default=0, help="judge so many pictures instead of training")
    arguments = parser.parse_args()
    if arguments.evaluate:
        for kind, value in evaluate(arguments.checkpoint, arguments.out, arguments.evaluate).items():
            print(f"{kind}: {value:.3f}")
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    trained = train(arguments.checkpoint, arguments.work)
    trained.to(torch.float16).save_pretrained(arguments.out, safe_serialization=True)


if __name__ == "__main__":
    main()
