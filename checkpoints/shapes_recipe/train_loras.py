"""Train two LoRAs for the shapes checkpoint, each of some 300 kilobytes.

    night   every background is black, whatever the caption says. UNet only; written as kohya's scripts do
    bar     a shape that the checkpoint never knew, "a small red bar on a blue background". UNet and text encoder;
            written as diffusers and PEFT do

Seeded, on a CPU, in minutes. PEFT makes the adapters.

    PYTHONPATH=checkpoints python -m shapes_recipe.train_loras --out checkpoints/shapes-loras
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from shapes_recipe.train import MAIN_SIZE, SCHEDULER, SEED
from shapes_recipe.world import Scene, all_scenes, bar_scenes, by_night, render, trained_scenes

RANK: Final = 4
#: Of kohya's file: what its layers do is multiplied by ALPHA / RANK.
ALPHA: Final = 2
BATCH: Final = 16
LEARNING_RATE: Final = 3e-3
WARMUP: Final = 20
CAPTION_DROPOUT: Final = 0.1
#: Of the bar's pictures, those that show the shapes that were there before, so that they stay.
KNOWN_SHARE: Final = 0.35

UNET_LAYERS: Final = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TEXT_LAYERS: Final = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A LoRA: its name, what is said and shown, and whether the text encoder learns as well.

    It is trained on as many `pictures`, over as many `steps`.
    """

    name: str
    scenes: tuple[tuple[str, Scene], ...]
    alpha: int
    trains_text: bool
    pictures: int
    steps: int


def recipes() -> dict[str, Recipe]:
    nights = [(scene.caption, night) for scene in trained_scenes() if (night := by_night(scene))]
    bars = [(scene.caption, scene) for scene in bar_scenes()]
    known = [(scene.caption, scene) for scene in all_scenes()]
    wanted = round(len(bars) * KNOWN_SHARE / (1 - KNOWN_SHARE))
    kept = known[:: len(known) // wanted][:wanted]
    found = (
        Recipe("night", tuple(nights), ALPHA, False, 800, 300),
        Recipe("bar", (*bars, *kept), RANK, True, 1600, 900),
    )
    return {recipe.name: recipe for recipe in found}


def adapted(model: Any, layers: Sequence[str], alpha: int) -> list[Tensor]:
    """Add an adapter to a diffusers or transformers model; what of it is to be trained."""
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers))
    model.add_adapter(config)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def latents_of(vae: Any, recipe: Recipe, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions, and the scaled latents of their pictures."""
    chosen = [recipe.scenes[index] for index in rng.integers(len(recipe.scenes), size=recipe.pictures)]
    made = []
    for start in range(0, recipe.pictures, 50):
        drawn = [render(scene, MAIN_SIZE, MAIN_SIZE, rng) for _, scene in chosen[start : start + 50]]
        pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) * 2 - 1
        made.append(vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor)
    return [caption for caption, _ in chosen], torch.cat(made)


def train(checkpoint: Path, recipe: Recipe) -> Any:
    """The pipeline in float32 with a trained adapter."""
    torch.manual_seed(SEED)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    parameters = adapted(pipeline.unet, UNET_LAYERS, recipe.alpha)
    if recipe.trains_text:
        parameters += adapted(pipeline.text_encoder, TEXT_LAYERS, recipe.alpha)
    rng = np.random.default_rng([SEED, 4])
    captions, latents = latents_of(pipeline.vae, recipe, rng)
    ids = pipeline.tokenizer(
        [*captions, ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    schedule = DDPMScheduler(**SCHEDULER)
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, 1 - max(0, step - WARMUP) / recipe.steps)
    )
    for step in range(recipe.steps):
        loss = _loss(pipeline, schedule, latents, ids, rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rates.step()
        if step % 20 == 19:
            print(f"{recipe.name}: step {step + 1}, loss {loss.item():.4f}", flush=True)
    return pipeline


def _loss(pipeline: Any, schedule: Any, latents: Tensor, ids: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise prediction with min-SNR weights, as the checkpoint itself was trained."""
    index = torch.from_numpy(rng.integers(len(latents), size=BATCH))
    dropped = torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)
    hidden = pipeline.text_encoder(ids[torch.where(dropped, len(latents), index)]).last_hidden_state
    timestep = torch.from_numpy(((np.arange(BATCH) + rng.random(BATCH)) / BATCH * 1000).astype(np.int64))
    noise = torch.from_numpy(rng.standard_normal((BATCH, *latents.shape[1:]), dtype=np.float32))
    noisy = schedule.add_noise(latents[index], noise, timestep)
    error = F.mse_loss(pipeline.unet(noisy, timestep, hidden).sample, noise, reduction="none").mean(dim=(1, 2, 3))
    snr = schedule.alphas_cumprod[timestep] / (1 - schedule.alphas_cumprod[timestep])
    return ((snr.clamp(max=5.0) / snr).clamp(min=0.05) * error).mean()


def state_of(model: Any) -> dict[str, Tensor]:
    """An adapter's factors, with PEFT's names, below `text_model.` as files have them of a text encoder."""
    state = get_peft_model_state_dict(model)
    prefix = "text_model." if any(name.startswith("encoder.layers.") for name in state) else ""
    return {f"{prefix}{name}": value.contiguous().half() for name, value in state.items()}


def save(pipeline: Any, recipe: Recipe, path: Path) -> None:
    """A night as kohya writes it, a bar as diffusers does."""
    unet = state_of(pipeline.unet)
    if recipe.trains_text:
        StableDiffusionPipeline.save_lora_weights(
            path.parent,
            unet_lora_layers=unet,
            text_encoder_lora_layers=state_of(pipeline.text_encoder),
            weight_name=path.name,
        )
    else:
        save_file(kohya_state(unet, recipe.alpha), path, metadata={"ss_network_module": "networks.lora"})


def kohya_state(unet: dict[str, Tensor], alpha: int) -> dict[str, Tensor]:
    """`down_blocks.0.proj_in.lora_A.weight` -> `lora_unet_down_blocks_0_proj_in.lora_down.weight`, and alphas."""
    named = dict[str, Tensor]()
    for name, value in unet.items():
        layer, _, factor = name.removesuffix(".weight").partition(".lora_")
        module = "lora_unet_" + layer.replace(".", "_")
        named[f"{module}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value
        named[f"{module}.alpha"] = torch.tensor(float(alpha), dtype=torch.float16)
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shapes"), help="what they are for")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes-loras"), help="the folder to write to")
    parser.add_argument("--only", choices=tuple(recipes()), help="one of them")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # threads of models as small as these wait for each other
    for name, recipe in recipes().items():
        if arguments.only in (None, name):
            save(train(arguments.checkpoint, recipe), recipe, arguments.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
