"""What each family of checkpoints is made of: one frozen table, and the only place that knows families by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "CLIP_SKIP",
    "COMPONENTS",
    "CONTROL",
    "CONTROL_SCALE",
    "DEFAULT_STEPS",
    "EMBEDDED_GUIDANCE_SCALE",
    "EMBEDDINGS",
    "FAMILIES",
    "FEW_STEPS",
    "INPUT_IDS",
    "LATENTS",
    "MOST_CLIP_SKIP",
    "PIXELS",
    "PREVIEW_DECODER",
    "PROMPT_CHUNKS",
    "SAMPLE_INPAINT",
    "SAMPLE_LATENTS",
    "TARGET_DEVICES",
    "TEXT_ENCODER",
    "TEXT_ENCODER_2",
    "UNET",
    "VAE_COMPONENTS",
    "VAE_DECODER",
    "VAE_ENCODER",
    "Family",
    "FewSteps",
    "device_kind",
]

TEXT_ENCODER: Final = "text_encoder"
TEXT_ENCODER_2: Final = "text_encoder_2"
UNET: Final = "unet"
VAE_DECODER: Final = "vae_decoder"
VAE_ENCODER: Final = "vae_encoder"
PREVIEW_DECODER: Final = "preview_decoder"  # a tiny autoencoder's, where the deployment has one
COMPONENTS: Final = (TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE_DECODER, VAE_ENCODER, PREVIEW_DECODER)
# Those that work in pixels, and take large pictures in tiles.
VAE_COMPONENTS: Final = (VAE_DECODER, VAE_ENCODER, PREVIEW_DECODER)

# Names of the tensors that the loop, the export and the component models agree on.
LATENTS: Final = "latents"
PIXELS: Final = "pixels"
INPUT_IDS: Final = "input_ids"
CLIP_SKIP: Final = "clip_skip"
EMBEDDINGS: Final = "embeddings"
CONTROL: Final = "control"
CONTROL_SCALE: Final = "control_scale"

# How many of a text encoder's windows (77 tokens: 75 and two marks) a prompt may take; one of another count is filled
# up with empty ones. Rows of a call are brought to one length by repeating whole prompts, to the least common multiple
# of what is in it. All of these divide 6, so no company makes a call longer than 462 tokens, the longest prompt's own,
# and prompts of up to 225 tokens are never filled up. A UNet's arithmetic at six windows is 1.04 times that at one
# (SD1.5 at 512 pixels; SDXL at 1024: 1.06), which is less than calls that share fewer rows would cost: so prompts of
# all lengths share calls. Powers of two would fill up prompts of three windows, and four beside three would make calls
# of twelve.
PROMPT_CHUNKS: Final = (1, 2, 3, 6)
# The most layers of a text encoder that a request may leave out; a checkpoint with fewer layers allows fewer.
MOST_CLIP_SKIP: Final = 12

# What the channels of the UNet's `sample` are, in order: `mask` is one channel, the others as many as the latents.
SAMPLE_LATENTS: Final = (LATENTS,)
SAMPLE_INPAINT: Final = (LATENTS, "mask", "masked_latents")

# Where the engines of each export target keep their tensors, in torch's words.
TARGET_DEVICES: Final = {
    "onnxruntime-cpu": "cpu",
    "onnxruntime": "cuda",
    "tensorrt": "cuda",
    "tensorrt-rtx": "cuda",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. What varies within one, such as widths and the kind of prediction, is in a checkpoint's configs.

    name             what users call it
    pipeline_classes the diffusers pipelines whose folders belong to it
    signature        values in the configs, as "part.key", that tell it from others with the same pipeline; of the
                     families that fit, the one with the longest signature counts
    text_key         a weight in a single file that only this kind of text encoder has
    encoders         its text encoders. The UNet gets their `hidden_states` side by side, in this order
    encoder_classes  the transformers class of each
    hidden_layer     which `hidden_states` the UNet gets: -1 the last, after the final layer norm; -2 the one before,
                     as it is. A request's `clip_skip` counts from there
    embedding_keys   what files of textual inversion call each encoder's vectors; none where there is one encoder, and
                     the file's only tensor is meant
    sample           what the UNet's `sample` is made of, channel after channel: SAMPLE_LATENTS or SAMPLE_INPAINT
    text_embeds      the encoder whose `pooled` is the UNet's `text_embeds`, "" for none
    time_ids         the UNet's `time_ids`: numbers, or the name of a side of the picture in pixels
    zero_empty_negative   an empty negative prompt is all zeros; a folder's model_index.json may say otherwise
    wide_vae         its autoencoder overflows in fp16, unless its config has `force_upcast: false`
    guidance_scale   of a request that gives none
    min_size, max_size    bounds of pictures, times the checkpoint's own size
    vae_tile         the largest side that its autoencoder takes in one piece, times the checkpoint's own size
    """

    name: str
    pipeline_classes: tuple[str, ...]
    signature: Mapping[str, object] = field(default_factory=dict)
    text_key: str = ""
    encoders: tuple[str, ...] = (TEXT_ENCODER,)
    encoder_classes: tuple[str, ...] = ("CLIPTextModel",)
    hidden_layer: int = -1
    embedding_keys: tuple[str, ...] = ("",)
    sample: tuple[str, ...] = SAMPLE_LATENTS
    text_embeds: str = ""
    time_ids: tuple[int | str, ...] = ()
    zero_empty_negative: bool = False
    wide_vae: bool = False
    guidance_scale: float = 7.5
    min_size: float = 0.5
    max_size: float = 3.0
    vae_tile: float = 2.0

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.encoders, UNET, VAE_DECODER, VAE_ENCODER)


_SD_PIPELINES: Final = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
_SDXL_PIPELINES: Final = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
_CLIP_KEY: Final = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
_OPEN_CLIP_KEY: Final = "cond_stage_model.model.token_embedding.weight"
_SDXL_CLIP_KEY: Final = "conditioner.embedders.1.model.positional_embedding"
_INPAINT: Final = {"unet.in_channels": 9}
# SD2.x has OpenCLIP's text encoder, with another activation than OpenAI's. Its diffusers folders lack the last layer,
# so that their last is the one before.
_OPEN_CLIP: Final = {"text_encoder.hidden_act": "gelu"}


def _sd21(name: str, signature: Mapping[str, object], sample: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        pipeline_classes=_SD_PIPELINES,
        signature={**_OPEN_CLIP, **signature},
        text_key=_OPEN_CLIP_KEY,
        sample=sample,
        min_size=1 / 3,
        max_size=2.0,
        vae_tile=4 / 3,
    )


def _sdxl(name: str, signature: Mapping[str, object], sample: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        pipeline_classes=_SDXL_PIPELINES,
        signature=signature,
        text_key=_SDXL_CLIP_KEY,
        encoders=(TEXT_ENCODER, TEXT_ENCODER_2),
        encoder_classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        hidden_layer=-2,
        embedding_keys=("clip_l", "clip_g"),
        sample=sample,
        text_embeds=TEXT_ENCODER_2,
        time_ids=("height", "width", 0, 0, "height", "width"),
        zero_empty_negative=True,
        wide_vae=True,
        guidance_scale=5.0,
        min_size=0.25,
        max_size=1.5,
        vae_tile=1.0,
    )


FAMILIES: Final = {
    family.name: family
    for family in (
        Family(name="sd15", pipeline_classes=_SD_PIPELINES, text_key=_CLIP_KEY),
        Family(
            name="sd15-inpaint",
            pipeline_classes=_SD_PIPELINES,
            signature=_INPAINT,
            text_key=_CLIP_KEY,
            sample=SAMPLE_INPAINT,
        ),
        _sd21("sd21", {}, SAMPLE_LATENTS),
        _sd21("sd21-inpaint", _INPAINT, SAMPLE_INPAINT),
        _sdxl("sdxl", {}, SAMPLE_LATENTS),
        _sdxl("sdxl-inpaint", _INPAINT, SAMPLE_INPAINT),
    )
}


@dataclass(frozen=True, slots=True)
class FewSteps:
    """A kind of distillation to a few steps: its name, how a scheduler's config shows it, and defaults for requests.

    `scheduler` lists the values that a key may have; None stands for a key that is not there.
    """

    name: str
    scheduler: Mapping[str, tuple[object, ...]]
    steps: int
    guidance_scale: float


DEFAULT_STEPS: Final = 20
# diffusers' default where the scale is an input of the UNet (`timestep_cond`) and costs no second row.
EMBEDDED_GUIDANCE_SCALE: Final = 8.5

FEW_STEPS: Final = (
    FewSteps("lcm", {"_class_name": ("LCMScheduler", "TCDScheduler")}, steps=4, guidance_scale=1.0),
    # Euler with trailing timesteps is what SD Turbo, SDXL Turbo and Lightning come with. Checkpoints trained for a
    # last step of pure noise have it too, and say so.
    FewSteps(
        "turbo",
        {
            "_class_name": ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
            "timestep_spacing": ("trailing",),
            "prediction_type": ("epsilon", None),
            "rescale_betas_zero_snr": (False, None),
        },
        steps=4,
        guidance_scale=0.0,
    ),
)


def device_kind(targets: Iterable[str]) -> str:
    """The kind of device that serves exports for these targets together. Raises ValueError where none does."""
    wanted = sorted(set(targets))
    if unknown := [target for target in wanted if target not in TARGET_DEVICES]:
        raise ValueError(f"the target {unknown[0]!r} is not one of {', '.join(TARGET_DEVICES)}; export again")
    kinds = {TARGET_DEVICES[target] for target in wanted}
    if len(kinds) != 1:
        raise ValueError(
            f"one denoising loop runs on one device, and the targets {', '.join(wanted)} need {len(kinds)}; "
            "export the checkpoints for one kind of device, or into two deployments"
        )
    return kinds.pop()
