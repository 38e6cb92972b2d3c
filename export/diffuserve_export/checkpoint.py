"""Read what a diffusers folder says of itself: family, parts, configs, weight files. No weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffuserve.spec import FAMILIES, Family
from diffuserve_export.errors import CheckpointError
from diffuserve_export.safetensors_file import parameters_in

__all__ = ["SERVING_DEFAULTS", "Checkpoint", "Part", "open_checkpoint"]

_PART_CLASSES: Final = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_WEIGHT_NAMES: Final = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# A UNet with one of these takes inputs that its graph would lack.
_UNET_EXTRAS: Final = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
# A checkpoint may bring defaults of its own for requests that leave a value out.
SERVING_DEFAULTS: Final = "diffuserve.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of the checkpoint with weights. `variant` is what diffusers calls it: None, or "fp16"."""

    name: str
    config: Mapping[str, Any]
    variant: str | None
    files: tuple[Path, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A diffusers folder that can be exported."""

    root: Path
    family: Family
    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    #: Of a request that gives none: from the folder's diffuserve.json, else the family's.
    guidance_scale: float

    @property
    def latent_channels(self) -> int:
        return int(self.parts["vae"].config.get("latent_channels", 4))

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.parts["vae"].config["block_out_channels"]) - 1)

    @property
    def sample_size(self) -> int:
        """The side in latents that the UNet was trained for."""
        size = self.parts["unet"].config.get("sample_size") or 64
        return int(size if isinstance(size, int) else size[0])

    @property
    def size_step(self) -> int:
        """Pictures must be a multiple of this on both sides: every level of the UNet halves its input exactly."""
        return self.latent_scale * int(2 ** (len(self.parts["unet"].config["block_out_channels"]) - 1))

    @property
    def token_limit(self) -> int:
        return int(self.parts["text_encoder"].config.get("max_position_embeddings", 77))

    @property
    def files(self) -> dict[str, Path]:
        """Everything that an export reads, by its path in the folder."""
        found = [self.root / "model_index.json", self.root / "scheduler" / "scheduler_config.json"]
        found += [path for path in (self.root / "tokenizer").iterdir() if path.is_file()]
        for part in self.parts.values():
            found += part.files
        if (self.root / SERVING_DEFAULTS).is_file():
            found.append(self.root / SERVING_DEFAULTS)
        return {path.relative_to(self.root).as_posix(): path for path in sorted(found)}


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the folder `root`. Raises CheckpointError, naming what is wrong and what would be right."""
    if not (root / "model_index.json").is_file():
        raise CheckpointError(f"{root} is not a diffusers folder: it has no model_index.json")
    index = _json(root / "model_index.json")
    family = _family(root, str(index.get("_class_name")))
    parts = {name: _part(root, name, index) for name in _PART_CLASSES}
    if not any((root / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{root} lacks its tokenizer: there is no tokenizer/tokenizer.json or vocab.json")
    scheduler = _json(_needed(root, "scheduler", "scheduler_config.json"))
    if not scheduler.get("_class_name"):
        raise CheckpointError(f"{root}/scheduler/scheduler_config.json has no _class_name")
    checkpoint = Checkpoint(root, family, parts, scheduler, _guidance_scale(root, family))
    _check_unet(checkpoint)
    return checkpoint


def _family(root: Path, pipeline_class: str) -> Family:
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    known = "; ".join(f"{family.name}: {', '.join(family.pipeline_classes)}" for family in FAMILIES.values())
    raise CheckpointError(f"{root} is a {pipeline_class}, and the known families are {known}")


def _guidance_scale(root: Path, family: Family) -> float:
    path = root / SERVING_DEFAULTS
    if not path.is_file():
        return family.guidance_scale
    defaults = _json(path)
    value = defaults.pop("guidance_scale", family.guidance_scale)
    if defaults:
        raise CheckpointError(f"{path} sets {', '.join(defaults)}, and only guidance_scale can be set there")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 50:
        raise CheckpointError(f"{path} sets guidance_scale to {value!r}, and it must be a number from 0 to 50")
    return float(value)


def _part(root: Path, name: str, index: Mapping[str, Any]) -> Part:
    declared = index.get(name)
    found = declared[1] if isinstance(declared, list) and len(declared) == 2 else None
    if found != _PART_CLASSES[name]:
        raise CheckpointError(f"{root} has {found or 'nothing'} as its {name}; {_PART_CLASSES[name]} is exported")
    config = _needed(root, name, "config.json")
    variant, weights = _weights(root / name, _WEIGHT_NAMES[name])
    parameters = sum(parameters_in(file) for file in weights if file.suffix == ".safetensors")
    return Part(name, _json(config), variant, (config, *weights), parameters)


def _weights(folder: Path, name: str) -> tuple[str | None, list[Path]]:
    """The weight files, plain ones before fp16 ones; with an index where they are in shards."""
    for variant, dotted in ((None, ""), ("fp16", ".fp16")):
        single, index = folder / f"{name}{dotted}.safetensors", folder / f"{name}.safetensors.index{dotted}.json"
        if single.is_file():
            return variant, [single]
        if index.is_file():
            return variant, [index, *_shards(index)]
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which can run code when they are read; "
            "save it with safe_serialization=True"
        )
    raise CheckpointError(f"{folder} has no weights: {name}.safetensors is missing")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index} names weights that are missing: {', '.join(missing) or 'none at all'}")
    return [index.parent / name for name in names]


def _check_unet(checkpoint: Checkpoint) -> None:
    config = checkpoint.parts["unet"].config
    extras = [key for key in _UNET_EXTRAS if config.get(key) is not None]
    if extras:
        raise CheckpointError(f"not built yet: a UNet with {', '.join(extras)}, which takes further inputs")
    if config.get("in_channels", 4) != checkpoint.latent_channels:
        raise CheckpointError(
            f"not built yet: a UNet of {config.get('in_channels')} input channels; "
            f"{checkpoint.latent_channels}, as its autoencoder has, are exported"
        )


def _needed(root: Path, folder: str, file: str) -> Path:
    path = root / folder / file
    if not path.is_file():
        raise CheckpointError(f"{root} lacks its {folder}: {path} is missing")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
