"""Train the shapes checkpoint: an autoencoder, then text encoder and UNet together, then a diffusers folder.

One command, seeded, and resumable: it continues from `--work` where it was stopped.

    PYTHONPATH=checkpoints python -m shapes_recipe.train --out checkpoints/shapes
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shapes_recipe.pooling import start_as_pooling
from shapes_recipe.tokenizer import VOCABULARY_SIZE, write_tokenizer
from shapes_recipe.world import all_scenes, render, trained_scenes

SEED: Final = 20261122
MAIN_SIZE: Final = 64
OTHER_SIZE: Final = 96
OTHER_SIZE_SHARE: Final = 0.2
CAPTION_DROPOUT: Final = 0.1

VAE_STEPS: Final = 5000
VAE_BATCH: Final = 8
# Late in its training the decoder learns to bear latents that are a little off, as a diffusion model's are.
VAE_NOISE_FROM: Final = 3800
VAE_NOISE: Final = 0.15
LATENT_PICTURES: Final = {MAIN_SIZE: 24_000, OTHER_SIZE: 6_000}
UNET_STEPS: Final = 2600
UNET_FINISH: Final = 320  # steps after those, at a low rate again, which make small shapes crisper
UNET_BATCH: Final = 64
CHECKPOINT_EVERY: Final = 100
# What a request gets that gives none. At Stable Diffusion's 7.5 so small a model's pictures burn out.
GUIDANCE_SCALE: Final = 2.0

# Stable Diffusion 1.5's own scheduler config.
SCHEDULER: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=2,  # flat colours do not survive narrow groups
        latent_channels=4,
        sample_size=MAIN_SIZE,
    )


def make_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=MAIN_SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers reads it as the number of heads, as in SD1.x
        cross_attention_dim=64,
        norm_num_groups=16,
    )


def rate(step: int, steps: int, finish: int, warmup: int = 200) -> float:
    """The learning rate's share at a step: linear warm-up, half a cosine down to 2 %, then from 15 % down to 0."""
    if step >= steps:
        return 0.15 * max(0.0, 1 - (step - steps) / max(1, finish))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """One stage of training: optimiser, EMA of the weights, progress bar, and a state file to resume from."""

    def __init__(
        self, module: nn.Module, state_path: Path, steps: int, learning_rate: float, ema: float, finish: int = 0
    ) -> None:
        self.module, self.state_path, self.steps, self.ema_decay = module, state_path, steps + finish, ema
        self.ema = copy.deepcopy(module).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate(step, steps, finish))
        self.step = 0
        if state_path.exists():
            state = torch.load(state_path, weights_only=True)
            for name in ("module", "ema", "optimiser", "schedule"):
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]

    def run(self, title: str, loss_at: Callable[[int], torch.Tensor]) -> nn.Module:
        """Train to the last step and return the averaged module. `loss_at(step)` draws its own batch from the step."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, refresh_per_second=0.1) as progress:
            task = progress.add_task(title, total=self.steps, completed=self.step)
            while self.step < self.steps:
                torch.manual_seed(SEED + self.step)  # a resumed run draws what an unbroken one would have drawn
                loss = loss_at(self.step)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimiser.step()
                self.schedule.step()
                self.step += 1
                self._average()
                if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
                    self._save()
                    progress.console.log(f"{title}: step {self.step}, loss {loss.item():.4f}")
                progress.update(task, advance=1, description=f"{title} loss {loss.item():.4f}")
        return self.ema

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.ema.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    def _save(self) -> None:
        names = ("module", "ema", "optimiser", "schedule")
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in names}
        state["step"] = self.step
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state_path)


def pictures(rng: np.random.Generator, count: int, size: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    scenes = trained_scenes()
    for index in rng.integers(len(scenes), size=count):
        yield scenes[index].caption, render(scenes[index], size, size, rng)


def vae_batch(step: int) -> torch.Tensor:
    """Pictures for the autoencoder, [n, 3, h, w] in -1 to 1; every sixth batch has the other size."""
    rng = np.random.default_rng([SEED, 1, step])
    other = step % 6 == 5
    size, count = (OTHER_SIZE, VAE_BATCH // 2) if other else (MAIN_SIZE, VAE_BATCH)
    scenes = all_scenes()
    batch = [render(scenes[index], size, size, rng) for index in rng.integers(len(scenes), size=count)]
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) * 2 - 1


def train_vae(work: Path) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = make_vae()
    start_as_pooling(vae)

    def loss_at(step: int) -> torch.Tensor:
        images = vae_batch(step)
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        if step >= VAE_NOISE_FROM:
            latents = latents + VAE_NOISE * torch.randn_like(latents)
        error = vae.decode(latents).sample - images
        # The worst pixels of each picture count on their own: a mean alone leaves bright droplets standing.
        worst = error.abs().flatten(1).topk(64, dim=1).values.mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.1 * worst + 2e-6 * posterior.kl().mean()

    trained = Trainer(vae, work / "vae.pt", VAE_STEPS, 8e-4, ema=0.995).run("autoencoder", loss_at)
    assert isinstance(trained, AutoencoderKL)
    return trained


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, size: int, path: Path) -> dict[str, Any]:
    """Captions and latent moments of a fixed set of pictures; made once and kept in the work folder."""
    if not path.exists():
        rng, moments, captions = np.random.default_rng([SEED, 2, size]), [], []
        drawn = list(pictures(rng, LATENT_PICTURES[size], size))
        for start in range(0, len(drawn), 50):
            chunk = drawn[start : start + 50]
            images = torch.from_numpy(np.stack([image for _, image in chunk])).permute(0, 3, 1, 2) * 2 - 1
            moments.append(vae.encode(images).latent_dist.mode())
            captions += [caption for caption, _ in chunk]
        torch.save({"latents": torch.cat(moments), "captions": captions}, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


class TextAndUNet(nn.Module):
    """The two that learn together: captions reach the UNet only through the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.unet = make_text_encoder(), make_unet()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        # Captions repeat within a batch, and the text encoder need see each only once.
        unique, inverse = torch.unique(input_ids, dim=0, return_inverse=True)
        hidden = self.text_encoder(unique).last_hidden_state[inverse]
        output: torch.Tensor = self.unet(sample, timestep, hidden).sample
        return output


def train_text_and_unet(vae: AutoencoderKL, tokenizer: Any, work: Path) -> TextAndUNet:
    torch.manual_seed(SEED)
    model = TextAndUNet()
    sets = {size: encode_pictures(vae, size, work / f"latents-{size}.pt") for size in LATENT_PICTURES}
    captions = ["", *(scene.caption for scene in all_scenes())]
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    row_of = {caption: row for row, caption in enumerate(captions)}
    noise_schedule = DDPMScheduler(**SCHEDULER)
    alphas = noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([SEED, 3, step])
        other = rng.random() < OTHER_SIZE_SHARE
        data = sets[OTHER_SIZE if other else MAIN_SIZE]
        count = UNET_BATCH // 2 if other else UNET_BATCH
        index = rng.integers(len(data["captions"]), size=count)
        latents = data["latents"][torch.from_numpy(index)] * vae.config.scaling_factor
        dropped = rng.random(count) < CAPTION_DROPOUT
        rows = [0 if drop else row_of[data["captions"][i]] for i, drop in zip(index, dropped, strict=True)]
        # Stratified timesteps: each batch covers the whole schedule, which calms the loss.
        timestep = torch.from_numpy(((np.arange(count) + rng.random(count)) / count * 1000).astype(np.int64))
        noise = torch.randn_like(latents)
        output = model(noise_schedule.add_noise(latents, noise, timestep), timestep, ids[rows])
        # Min-SNR weighting, gamma 5 (Hang et al. 2023, eq. 8, for noise prediction).
        weight = (snr[timestep].clamp(max=5.0) / snr[timestep]).clamp(min=0.05)
        per_row = F.mse_loss(output, noise, reduction="none").mean(dim=(1, 2, 3))
        return (weight * per_row).mean()

    trainer = Trainer(model, work / "unet.pt", UNET_STEPS, 1e-3, ema=0.998, finish=UNET_FINISH)
    trained = trainer.run("text encoder and UNet", loss_at)
    assert isinstance(trained, TextAndUNet)
    return trained


def assemble(vae: AutoencoderKL, model: TextAndUNet, tokenizer: Any, out: Path) -> None:
    """Write the plain diffusers folder, weights in fp16."""
    # As a config and not as arguments: PNDM knows no clip_sample, but its file carries it to the samplers that do.
    own = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    scheduler = PNDMScheduler.from_config({**SCHEDULER, **own})
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    (out / "diffuserve.json").write_text(json.dumps({"guidance_scale": GUIDANCE_SCALE}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="the diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="states to resume from")
    parser.add_argument("--until", choices=("vae", "all"), default="all", help="the last stage to run")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    write_tokenizer(arguments.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(arguments.out / "tokenizer")
    vae = train_vae(arguments.work)
    if arguments.until == "vae":
        return
    with torch.no_grad():
        sample = torch.cat([vae_batch(step) for step in (0, 1, 2, 3, 4, 6, 7, 8)])
        vae.register_to_config(scaling_factor=round(1 / vae.encode(sample).latent_dist.mode().std().item(), 4))
    model = train_text_and_unet(vae, tokenizer, arguments.work)
    assemble(vae, model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
