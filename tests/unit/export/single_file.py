"""Write a pipeline's weights into one file, with the names that the original code gave them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["original_controlnet", "save_single_file"]

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_UNET |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_VAE = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
_VAE |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final"}
_OPEN_CLIP |= {
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
}
_OPEN_CLIP |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_OPEN_CLIP |= {"self_attn.out_proj": "attn.out_proj"}


def save_single_file(pipeline: Any, file: Path, *, without: str = "") -> Path:
    """All weights of an SD1.x or SDXL pipeline but those whose name starts with `without`."""
    state = {f"model.diffusion_model.{_unet(name, pipeline)}": one for name, one in pipeline.unet.state_dict().items()}
    for name, one in pipeline.vae.state_dict().items():
        renamed = _vae(name, len(pipeline.vae.config.block_out_channels))
        # The original's attention is made of convolutions.
        as_convolution = "mid.attn_1" in renamed and renamed.endswith("weight") and "norm" not in renamed
        state[f"first_stage_model.{renamed}"] = one[..., None, None] if as_convolution else one
    second = getattr(pipeline, "text_encoder_2", None)
    first = "conditioner.embedders.0" if second else "cond_stage_model"
    for name, one in pipeline.text_encoder.state_dict().items():
        state[f"{first}.transformer.text_model.{name}"] = one
    if second:
        state |= {f"conditioner.embedders.1.model.{name}": one for name, one in _open_clip(second.state_dict()).items()}
    kept = {name: one.contiguous() for name, one in state.items() if not without or not name.startswith(without)}
    save_file(kept, file)
    return file


def original_controlnet(model: Any) -> dict[str, torch.Tensor]:
    """The weights of an SD1.x ControlNetModel, as the original code names them."""
    layers = model.config.layers_per_block + 1
    renamed = {}
    for name, one in model.state_dict().items():
        if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
            new = f"zero_convs.{match[1]}.0.{match[2]}"
        elif match := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|blocks\.(\d)|conv_out)\.(.*)", name):
            # There it is one list, with an activation after every layer.
            place = {"conv_in": 0, "conv_out": 14}.get(match[1], 2 * int(match[2] or 0) + 2)
            new = f"input_hint_block.{place}.{match[3]}"
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            is_resnet = match[1] == "resnets"
            new = f"middle_block.{2 * int(match[2]) if is_resnet else 1}."
            new += _replace(match[3], _RESNET) if is_resnet else match[3]
        else:
            new = _side(name, layers, ()).replace("controlnet_mid_block", "middle_block_out.0")
        renamed[f"control_model.{new}"] = one.contiguous()
    return renamed


def _replace(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def _unet(name: str, pipeline: Any) -> str:
    return _side(name, pipeline.unet.config.layers_per_block + 1, pipeline.unet.up_blocks)


def _side(name: str, layers: int, up_blocks: Any) -> str:
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        blocks = "input_blocks" if side == "down" else "output_blocks"
        first = layers * block + (side == "down")
        if kind == "downsamplers":
            return f"{blocks}.{layers * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            attends = hasattr(up_blocks[block], "attentions")
            return f"{blocks}.{first + layers - 1}.{1 + attends}.{rest}"
        rest = _replace(rest, _RESNET) if kind == "resnets" else rest
        return f"{blocks}.{first + index}.{int(kind == 'attentions')}.{rest}"
    return _replace(name, _UNET)


def _vae(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    return _replace(name, _VAE)


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {_replace(name.removeprefix("text_model."), _OPEN_CLIP): one for name, one in state.items()}
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        joined = name.replace("self_attn.q_proj.", "attn.in_proj_")
        renamed[joined] = torch.cat(parts)
    return renamed
