"""Small LoRAs: a checkpoint of a few layers, and files for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffuserve.lora.layout import CONV, LINEAR, Layer, LoraLayout, layout_of
from diffuserve.manifest import Component, TensorShape
from diffuserve.spec import TEXT_ENCODER, UNET

__all__ = ["LAYOUTS", "TO_Q", "WORDS", "adapted", "pair", "put", "tensors_of"]

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROJ = "up_blocks.0.attentions.1.proj_in"
WORDS = "text_model.encoder.layers.0.self_attn.q_proj"


def unet_layout(rank: int = 4, adapters: int = 5) -> LoraLayout:
    return layout_of([[Layer(TO_Q, LINEAR, 6, 8)], [Layer(PROJ, CONV, 5, 5)]], rank, adapters)


LAYOUTS: Mapping[str, LoraLayout] = {
    UNET: unet_layout(),
    TEXT_ENCODER: layout_of([[Layer(WORDS, LINEAR, 3, 3)]], 4, 5),
}


def adapted(component: Component, layout: LoraLayout) -> Component:
    """A component of fakes that takes adapters."""
    lora = (TensorShape("lora", "FP32", ("adapters", layout.size)), TensorShape("lora_index", "INT64", ("rows",)))
    return Component(component.model, (*component.inputs, *lora), component.outputs, "0" * 64, 0, lora=layout)


def pair(rank: int, width: int, out: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)


def tensors_of(rank: int = 2, seed: int = 1, layer: str = f"unet.{TO_Q}") -> dict[str, torch.Tensor]:
    down, up = pair(rank, 6, 8, seed)
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def put(folder: Path, name: str, tensors: Mapping[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    written = folder / f"{name}.writing"
    save_file(dict(tensors or tensors_of()), written, metadata or None)
    written.rename(path)
    return path
