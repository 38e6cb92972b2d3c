"""Random checkpoints of each family, as small as the architecture allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["PIPELINES", "TOKENIZER", "random_pipeline"]

TOKENIZER = Path(__file__).parents[3] / "checkpoints" / "shapes" / "tokenizer"
_BETAS: Any = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def _vae() -> AutoencoderKL:
    """Factor 2 from pixels to latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.3,
    )


def _text_config(**changed: Any) -> CLIPTextConfig:
    values = {
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    return CLIPTextConfig(**{**values, **changed})


def _unet(**changed: Any) -> UNet2DConditionModel:
    """Two levels, 8 latents a side: 16 pixels, in steps of 4."""
    values: dict[str, Any] = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**values, **changed})


def _sd(pipeline_class: Any, scheduler: Any, text: Any = (), pad: str = "<|endoftext|>", **unet: Any) -> Any:
    return pipeline_class(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(**dict(text))),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad),
        unet=_unet(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd15() -> Any:
    return _sd(StableDiffusionPipeline, PNDMScheduler(skip_prk_steps=True, **_BETAS))


def _inpaint() -> Any:
    return _sd(StableDiffusionInpaintPipeline, PNDMScheduler(skip_prk_steps=True, **_BETAS), in_channels=9)


def _sd21() -> Any:
    """OpenCLIP's activation and padding, v-prediction, attention in float32, linear projections."""
    return _sd(
        StableDiffusionPipeline,
        DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **_BETAS),
        text={"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 2},
        pad="!",
        upcast_attention=True,
        use_linear_projection=True,
        attention_head_dim=(2, 4),
    )


def _lcm() -> Any:
    return _sd(StableDiffusionPipeline, LCMScheduler(**_BETAS), time_cond_proj_dim=12)


def _sdxl() -> Any:
    """Text of widths 16 and 24, the second projected to 20; two transformer layers on the lower level."""
    second = _text_config(
        hidden_size=24, projection_dim=20, hidden_act="gelu", eos_token_id=2, num_hidden_layers=3, num_attention_heads=3
    )
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(num_hidden_layers=2, eos_token_id=2)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_BETAS),
        force_zeros_for_empty_prompt=True,
    )


PIPELINES = {"sd15": _sd15, "sd15-inpaint": _inpaint, "sd21": _sd21, "lcm": _lcm, "sdxl": _sdxl}


def random_pipeline(kind: str = "sd15") -> Any:
    torch.manual_seed(5)
    return PIPELINES[kind]()
