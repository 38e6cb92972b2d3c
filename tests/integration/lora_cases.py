"""LoRAs made on the fly, in the forms that trainers write, and requests that mix them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from diffuserve.lora.choice import parse_loras
from diffuserve.lora.layout import CONV, LoraTarget
from diffuserve.manifest import Manifest
from diffuserve.request import GenerateRequest
from diffuserve.spec import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from integration.family_cases import CONTROL
from unit.pictures import encoded

__all__ = ["LoraCase", "factors_of", "kohya", "named_by_diffusers", "original_unet", "pictured", "put_lora"]

PROMPT, NEGATIVE = "a large red circle on a blue background", "a small green ring"
_KOHYA: Mapping[str, str] = {UNET: "lora_unet", TEXT_ENCODER: "lora_te", TEXT_ENCODER_2: "lora_te2"}

#: Of a layer: down [rank, in] and up [out, rank], with two more sides for a convolution.
Factors = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]


def factors_of(
    manifest: Manifest, seed: int, rank: int = 4, components: Sequence[str] = (), size: float = 0.25
) -> Factors:
    """Random ones for every layer, or those of some components, that change a picture but leave it one."""
    generator = torch.Generator().manual_seed(seed)
    made: Factors = {}
    for component, one in manifest.components.items():
        if one.lora is None or component not in (components or manifest.components):
            continue
        for target in one.lora.targets:
            made[component, target.path] = _pair(target, rank, size, generator)
    return made


def _pair(target: LoraTarget, rank: int, size: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    down = torch.randn(rank, target.in_features, generator=generator) * target.in_features**-0.5
    up = torch.randn(target.out_features, rank, generator=generator) * size * rank**-0.5
    sides = (1, 1) if target.kind == CONV else ()
    return down.reshape(*down.shape, *sides), up.reshape(*up.shape, *sides)


def named_by_diffusers(factors: Factors) -> dict[str, torch.Tensor]:
    """As PEFT and diffusers save them."""
    tensors: dict[str, torch.Tensor] = {}
    for (component, path), (down, up) in factors.items():
        tensors |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}
    return tensors


def kohya(factors: Factors, alpha: float, names: Mapping[str, str] = _KOHYA) -> dict[str, torch.Tensor]:
    """As kohya's scripts save them."""
    tensors: dict[str, torch.Tensor] = {}
    for (component, path), (down, up) in factors.items():
        name = f"{names[component]}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def original_unet(tensors: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """kohya's names for SDXL: those of the original UNet, with so many layers in a block."""
    renamed = {}
    for name, tensor in tensors.items():
        side, _, rest = name.removeprefix("lora_unet_").partition("_attentions_")
        position, _, rest = rest.partition("_")
        if side == "mid_block":
            name = f"lora_unet_middle_block_1_{rest}"
        elif side.startswith("down_blocks_"):
            name = f"lora_unet_input_blocks_{1 + int(side[12:]) * (layers + 1) + int(position)}_1_{rest}"
        elif side.startswith("up_blocks_"):
            name = f"lora_unet_output_blocks_{int(side[10:]) * (layers + 1) + int(position)}_1_{rest}"
        renamed[name] = tensor
    return renamed


def put_lora(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    """As a user should: written beside, and moved in when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    written, path = folder / f"{name}.writing", folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, written)
    return written.rename(path)


@dataclass(frozen=True)
class LoraCase:
    """A request with LoRAs; `control` is the scale of its control, None for none."""

    family: str
    loras: tuple[str, ...] = ()
    negative: str = ""
    guidance: float = 4.0
    seed: int = 3
    steps: int = 6
    prompt: str = PROMPT
    control: float | None = None

    @property
    def request(self) -> GenerateRequest:
        given: dict[str, Any] = {}
        if self.control is not None:
            given = {"control_image": encoded(CONTROL), "control_scale": self.control}
        return GenerateRequest(
            width=64,
            height=64,
            prompt=self.prompt,
            negative_prompt=self.negative,
            checkpoint=self.family,
            guidance_scale=self.guidance,
            steps=self.steps,
            seed=self.seed,
            loras=self.loras,
            **given,
        )


def pictured(pipeline: Any, case: LoraCase, files: Mapping[str, Path]) -> Any:
    """diffusers' picture with the same adapters and weights; of a control, by a pipeline with its ControlNet."""
    pipeline.unload_lora_weights()
    choices = parse_loras(case.loras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a model that has an adapter already
        for choice in choices:
            pipeline.load_lora_weights(str(files[choice.name]), adapter_name=choice.name)
    if choices:
        pipeline.set_adapters([one.name for one in choices], [one.weight for one in choices])
    controlled: dict[str, Any] = {}
    if case.control is not None:
        controlled = {"image": CONTROL, "controlnet_conditioning_scale": case.control}
    picture = pipeline(
        case.prompt,
        negative_prompt=case.negative or None,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(case.seed),
        **controlled,
    ).images[0]
    pipeline.unload_lora_weights()
    return np.asarray(picture).astype(int)
