"""Small checkpoints of each family that a ControlNet can be made for, and random ControlNets."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

__all__ = ["random_controlnet", "with_middle"]


def with_middle(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """One of the same size and other weights that has a middle block, which every ControlNet adds to."""
    torch.manual_seed(6)
    config = {**unet.config, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    made: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    return made


def random_controlnet(unet: UNet2DConditionModel, levels: int = 2, **changed: Any) -> ControlNetModel:
    """One that fits the UNet, and adds something. `levels` is how many times a picture is halved, and one more."""
    torch.manual_seed(7)
    made = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 8, 8, 8)[:levels], load_weights_from_unet=False
    )
    made = ControlNetModel.from_config({**made.config, "in_channels": 4, **changed})
    # As they are made, what it adds is zero, and what it sees of a picture is little.
    spreads = {"controlnet_down_blocks": 0.2, "controlnet_mid_block": 0.2, "controlnet_cond_embedding": 0.6}
    for name, parameter in made.named_parameters():
        if spread := spreads.get(name.split(".")[0]):
            torch.nn.init.normal_(parameter, std=spread)
    return made
