"""What a checkpoint says of itself: family, parts, configs, where its weights are. No weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffuserve.spec import MOST_CLIP_SKIP, PREVIEW_DECODER, UNET, VAE_DECODER, VAE_ENCODER, Family
from diffuserve_export.errors import CheckpointError

__all__ = [
    "CONTROLNET",
    "PART_OF",
    "PREVIEW_VAE",
    "SERVING_DEFAULTS",
    "Checkpoint",
    "FolderWeights",
    "Part",
    "RandomWeights",
    "SingleFileWeights",
    "Weights",
    "part_of",
]

# A checkpoint may bring defaults of its own for requests that leave a value out.
SERVING_DEFAULTS: Final = "diffuserve.json"
# A UNet with one of these takes inputs that its graph would lack.
_UNET_EXTRAS: Final = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
# The embedding that a family with `time_ids` adds to the timestep's, in diffusers' words.
_TIME_IDS_EMBEDDING: Final = "text_time"

#: The part that a checkpoint has where one was given for previews.
PREVIEW_VAE: Final = "preview_vae"
#: The part that a checkpoint has where a ControlNet was given; its component is the UNet.
CONTROLNET: Final = "controlnet"
PART_OF: Final = {VAE_DECODER: "vae", VAE_ENCODER: "vae", PREVIEW_DECODER: PREVIEW_VAE}


def part_of(component: str) -> str:
    """The folder of the checkpoint that a component comes from."""
    return PART_OF.get(component, component)


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """Each part's weights lie in its folder."""


@dataclass(frozen=True, slots=True)
class SingleFileWeights:
    """All weights lie in one file, with the names that the original code gave them."""

    file: Path


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Weights as the libraries initialise them, from a seed."""

    seed: int = 0


Weights = FolderWeights | SingleFileWeights | RandomWeights


@dataclass(frozen=True, slots=True)
class Part:
    """One of the checkpoint's models. `variant` is what diffusers calls it: None, or "fp16".

    `folder` is where it lies if that is not in the checkpoint, or `file` if it is a single file.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    variant: str | None
    files: tuple[Path, ...]
    parameters: int
    folder: Path | None = None
    file: Path | None = None

    @property
    def pickled(self) -> bool:
        return any(file.suffix == ".bin" for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be exported. `root` is a diffusers folder, of configs alone where weights lie elsewhere.

    `guidance_scale` and `steps` are of a request that gives none. `label` names the checkpoint in messages.
    """

    label: str
    root: Path
    family: Family
    weights: Weights
    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    guidance_scale: float
    steps: int
    zero_empty_negative: bool
    #: Everything that an export reads, by a name that does not depend on where the checkpoint lies.
    files: Mapping[str, Path]

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.family.components, *((PREVIEW_DECODER,) if PREVIEW_VAE in self.parts else ()))

    def parameters_of(self, component: str) -> int:
        """How many weights a component holds."""
        names = (UNET, CONTROLNET) if component == UNET else (part_of(component),)
        return sum(self.parts[name].parameters for name in names if name in self.parts)

    @property
    def latent_channels(self) -> int:
        return int(self.parts["vae"].config.get("latent_channels", 4))

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.parts["vae"].config["block_out_channels"]) - 1)

    @property
    def sample_channels(self) -> int:
        """Channels of the UNet's `sample`."""
        return sum(1 if name == "mask" else self.latent_channels for name in self.family.sample)

    @property
    def sample_size(self) -> int:
        """The side in latents that the UNet was trained for."""
        size = self.parts[UNET].config.get("sample_size") or 64
        return int(size if isinstance(size, int) else size[0])

    @property
    def size_step(self) -> int:
        """Pictures must be a multiple of this on both sides: every level of the UNet halves its input exactly."""
        return self.latent_scale * int(2 ** (len(self.parts[UNET].config["block_out_channels"]) - 1))

    @property
    def latents_multiple(self) -> int:
        """The latents of a picture, rows times columns, are a multiple of this."""
        return (self.size_step // self.latent_scale) ** 2

    @property
    def token_limit(self) -> int:
        limits = {self.parts[name].config.get("max_position_embeddings", 77) for name in self.family.encoders}
        return int(min(limits))

    @property
    def clip_skip(self) -> int:
        """The most layers that a request may leave out: down to what goes into the first layer of every encoder."""
        layers = min(int(self.parts[name].config.get("num_hidden_layers", 12)) for name in self.family.encoders)
        return min(MOST_CLIP_SKIP, layers + 1 + self.family.hidden_layer)

    @property
    def guidance_embedding(self) -> int:
        """The width of `timestep_cond`, 0 where the UNet takes none."""
        return int(self.parts[UNET].config.get("time_cond_proj_dim") or 0)

    def tokenizer(self, encoder: str) -> Path:
        """The folder of a text encoder's tokenizer."""
        return self.root / encoder.replace("text_encoder", "tokenizer")

    def check(self) -> None:
        """Raise CheckpointError for parts that do not fit each other, or the family."""
        family, config = self.family, self.parts[UNET].config
        extras = [key for key in _UNET_EXTRAS if config.get(key) is not None]
        if extras:
            raise CheckpointError(f"not built yet: a UNet with {', '.join(extras)}, which takes further inputs")
        if config.get("in_channels", 4) != self.sample_channels:
            raise CheckpointError(
                f"not built yet: a UNet of {config.get('in_channels')} input channels; {self.sample_channels} are "
                f"exported for {family.name}, as its autoencoder has {self.latent_channels}"
            )
        expected = _TIME_IDS_EMBEDDING if family.time_ids else None
        if config.get("addition_embed_type") != expected:
            raise CheckpointError(
                f"the UNet of {self.label} has addition_embed_type {config.get('addition_embed_type')!r}, and "
                f"{family.name} needs {expected!r}; its pipeline is not what model_index.json says"
            )
        widths = [int(self.parts[name].config["hidden_size"]) for name in family.encoders]
        if sum(widths) != config["cross_attention_dim"]:
            raise CheckpointError(
                f"the UNet of {self.label} takes text of width {config['cross_attention_dim']}, and its text encoders "
                f"give {' + '.join(map(str, widths))}; parts of two checkpoints were mixed"
            )
