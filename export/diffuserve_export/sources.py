"""Open a checkpoint: a diffusers folder, a single file, or an architecture with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from diffuserve.spec import (
    DEFAULT_STEPS,
    EMBEDDED_GUIDANCE_SCALE,
    FAMILIES,
    FEW_STEPS,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    Family,
    FewSteps,
)
from diffuserve_export.checkpoint import (
    PREVIEW_VAE,
    SERVING_DEFAULTS,
    Checkpoint,
    FolderWeights,
    Part,
    RandomWeights,
    SingleFileWeights,
    Weights,
)
from diffuserve_export.errors import CheckpointError
from diffuserve_export.safetensors_file import shapes_in
from diffuserve_export.weight_files import weight_files

__all__ = [
    "ARCHITECTURES",
    "open_architecture",
    "open_checkpoint",
    "open_single_file",
    "read_config",
    "with_preview_vae",
]

#: A diffusers folder without weights for each family whose checkpoints are all alike.
ARCHITECTURES: Final = Path(__file__).parent / "architectures"

_PREFIXES: Final = {
    UNET: ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    TEXT_ENCODER: ("cond_stage_model.", "conditioner.embedders.0."),
    TEXT_ENCODER_2: ("conditioner.embedders.1.",),
}
_TINY: Final = "AutoencoderTiny"
_FIRST_CONVOLUTION: Final = "model.diffusion_model.input_blocks.0.0.weight"

# What a part's weights are: diffusers' variant, the files, the number of parameters.
_Found = tuple[str | None, list[Path], int]


def open_checkpoint(root: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read the diffusers folder `root`. Raises CheckpointError, naming what is wrong and what would be right."""

    def find(part: str) -> _Found:
        return weight_files(root / part, part, allow_pickle=allow_pickle)

    return _open(root, str(root), FolderWeights(), find)


def open_architecture(name: str, seed: int = 0) -> Checkpoint:
    """A family's full-size models with random weights. Raises CheckpointError for a family without an architecture."""
    root = _architecture(name)
    counts = _json(root / "parameters.json")
    return _open(root, f"the architecture {name}", RandomWeights(seed), lambda part: (None, [], counts[part]))


def open_single_file(file: Path, config: Path | None = None) -> Checkpoint:
    """Read the header of a `.safetensors` file with a whole checkpoint in it.

    Its configs are those of the family that its weights show, or come from the diffusers folder `config`.
    """
    shapes = shapes_in(file)
    family = _family_of_single_file(file, shapes)
    root = config or _architecture(
        family.name, f"{file} is of family {family.name}, for which no configs are known; give them with --config"
    )

    def find(part: str) -> _Found:
        sizes = [math.prod(shape) for name, shape in shapes.items() if name.startswith(_PREFIXES[part])]
        if not sizes:
            raise CheckpointError(
                f"{file} lacks its {part}: no weight in it starts with {' or '.join(_PREFIXES[part])}; "
                "give a file with a whole checkpoint, or a diffusers folder"
            )
        return None, [], sum(sizes)

    return _open(root, str(file), SingleFileWeights(file), find, expected=family)


def with_preview_vae(checkpoint: Checkpoint, folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint with the diffusers AutoencoderTiny in `folder` for its previews. Raises CheckpointError."""
    config = read_config(folder)
    if config.get("_class_name") != _TINY:
        raise CheckpointError(f"{folder} is a {config.get('_class_name')}, and previews are made by an {_TINY}")
    levels = len(config.get("decoder_block_out_channels", (64, 64, 64, 64))) - 1
    found = config.get("latent_channels", 4), config.get("upsampling_scaling_factor", 2) ** levels
    wanted = checkpoint.latent_channels, checkpoint.latent_scale
    if found != wanted:
        raise CheckpointError(
            f"{folder} takes latents of {found[0]} channels, {found[1]} pixels each, and {checkpoint.label} has "
            f"{wanted[0]} of {wanted[1]}; give one that was made for its family"
        )
    variant, weights, parameters = weight_files(folder, PREVIEW_VAE, allow_pickle=allow_pickle)
    part = Part(PREVIEW_VAE, _TINY, config, variant, tuple(weights), parameters, folder)
    files = {f"{PREVIEW_VAE}/{path.name}": path for path in (folder / "config.json", *weights)}
    return replace(checkpoint, parts={**checkpoint.parts, PREVIEW_VAE: part}, files={**checkpoint.files, **files})


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the one model in `folder`. Raises CheckpointError where there is none."""
    return _json(_needed(folder, "", "config.json"))


def _architecture(name: str, message: str = "") -> Path:
    folder = ARCHITECTURES / name
    if not (folder / "model_index.json").is_file():
        known = sorted(path.parent.name for path in ARCHITECTURES.glob("*/model_index.json"))
        raise CheckpointError(message or f"the architecture of {name!r} is not known; known are {', '.join(known)}")
    return folder


def _family_of_single_file(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    first = shapes.get(_FIRST_CONVOLUTION)
    if first is None:
        raise CheckpointError(
            f"{file} is no whole Stable Diffusion checkpoint: it lacks {_FIRST_CONVOLUTION}; give a file that has the "
            "UNet, the autoencoder and the text encoders, or a diffusers folder"
        )
    kin = [family for family in FAMILIES.values() if family.text_key in shapes]
    if not kin:
        raise CheckpointError(
            f"{file} has no text encoder of a known family: {', '.join(FAMILIES)}; give its diffusers folder"
        )
    fits = [family for family in kin if family.signature.get("unet.in_channels", 4) == first[1]]
    if not fits:
        raise CheckpointError(f"not built yet: a UNet of {first[1]} input channels, as {file} has")
    return fits[0]


def _open(
    root: Path, label: str, weights: Weights, find: Callable[[str], _Found], expected: Family | None = None
) -> Checkpoint:
    if not (root / "model_index.json").is_file():
        raise CheckpointError(f"{root} is not a diffusers folder: it has no model_index.json")
    index = _json(root / "model_index.json")
    scheduler = _json(_needed(root, "scheduler", "scheduler_config.json"))
    if not scheduler.get("_class_name"):
        raise CheckpointError(f"{root}/scheduler/scheduler_config.json has no _class_name")
    family = _family(root, index)
    if expected is not None and expected != family:
        raise CheckpointError(f"{label} is of family {expected.name}, and its configs in {root} of {family.name}")
    parts = {name: _part(root, name, class_name, index, find) for name, class_name in _part_classes(family).items()}
    defaults = _serving_defaults(root)
    few = _few_steps(scheduler)
    guidance = few.guidance_scale if few else family.guidance_scale
    if parts[UNET].config.get("time_cond_proj_dim"):
        guidance = EMBEDDED_GUIDANCE_SCALE
    checkpoint = Checkpoint(
        label=label,
        root=root,
        family=family,
        weights=weights,
        parts=parts,
        scheduler=scheduler,
        guidance_scale=float(defaults.get("guidance_scale", guidance)),
        steps=int(defaults.get("steps", few.steps if few else DEFAULT_STEPS)),
        zero_empty_negative=bool(family.zero_empty_negative and index.get("force_zeros_for_empty_prompt", True)),
        files=_files(root, family, weights, parts),
    )
    _check_tokenizers(checkpoint)
    checkpoint.check()
    return checkpoint


def _part_classes(family: Family) -> dict[str, str]:
    encoders = dict(zip(family.encoders, family.encoder_classes, strict=True))
    return {**encoders, UNET: "UNet2DConditionModel", "vae": "AutoencoderKL"}


def _family(root: Path, index: Mapping[str, Any]) -> Family:
    pipeline_class = str(index.get("_class_name"))
    kin = [family for family in FAMILIES.values() if pipeline_class in family.pipeline_classes]
    if not kin:
        known = "; ".join(f"{family.name}: {family.pipeline_classes[0]}" for family in FAMILIES.values())
        raise CheckpointError(f"{root} is a {pipeline_class}, and the known families are {known}")
    parts = {key.split(".")[0] for family in kin for key in family.signature}
    configs = {part: _json(_needed(root, part, "config.json")) for part in sorted(parts)}

    def fits(key: str, value: object) -> bool:
        part, name = key.split(".")
        return bool(configs[part].get(name) == value)

    fitting = [one for one in kin if all(fits(key, value) for key, value in one.signature.items())]
    return max(fitting, key=lambda one: len(one.signature))


def _few_steps(scheduler: Mapping[str, Any]) -> FewSteps | None:
    for kind in FEW_STEPS:
        if all(scheduler.get(key) in values for key, values in kind.scheduler.items()):
            return kind
    return None


def _serving_defaults(root: Path) -> dict[str, Any]:
    path = root / SERVING_DEFAULTS
    if not path.is_file():
        return {}
    defaults = _json(path)
    bounds = {"guidance_scale": (0, 50, (int, float)), "steps": (1, 150, (int,))}
    if unknown := [key for key in defaults if key not in bounds]:
        raise CheckpointError(f"{path} sets {', '.join(unknown)}, and only {' and '.join(bounds)} can be set there")
    for key, value in defaults.items():
        low, high, types = bounds[key]
        if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
            raise CheckpointError(f"{path} sets {key} to {value!r}, and it must be a number from {low} to {high}")
    return defaults


def _part(root: Path, name: str, class_name: str, index: Mapping[str, Any], find: Callable[[str], _Found]) -> Part:
    declared = index.get(name)
    found = declared[1] if isinstance(declared, list) and len(declared) == 2 else None
    if found != class_name:
        raise CheckpointError(f"{root} has {found or 'nothing'} as its {name}; {class_name} is exported")
    config = _json(_needed(root, name, "config.json"))
    variant, files, parameters = find(name)
    return Part(name, class_name, config, variant, tuple(files), parameters)


def _check_tokenizers(checkpoint: Checkpoint) -> None:
    for encoder in checkpoint.family.encoders:
        folder = checkpoint.tokenizer(encoder)
        # An architecture's has CLIP's vocabulary, which lies beside them once.
        if checkpoint.root.parent != ARCHITECTURES and not any(
            (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):
            raise CheckpointError(
                f"{checkpoint.root} lacks its {folder.name}: there is no {folder.name}/tokenizer.json or vocab.json"
            )


def _files(root: Path, family: Family, weights: Weights, parts: Mapping[str, Part]) -> dict[str, Path]:
    found = [root / "model_index.json", root / "scheduler" / "scheduler_config.json", root / SERVING_DEFAULTS]
    for encoder in family.encoders:
        found += sorted((root / encoder.replace("text_encoder", "tokenizer")).glob("*"))
    for part in parts.values():
        found += [root / part.name / "config.json", *part.files]
    files = {path.relative_to(root).as_posix(): path for path in sorted(found) if path.is_file()}
    if isinstance(weights, SingleFileWeights):
        files["weights"] = weights.file
    return files


def _needed(root: Path, folder: str, file: str) -> Path:
    path = root / folder / file
    if not path.is_file():
        raise CheckpointError(f"{root} lacks its {folder or file}: {path} is missing")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
