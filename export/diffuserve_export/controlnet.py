"""A ControlNet to be built into a checkpoint's UNet: whether it fits, and its weights from a single file.

One ControlNetModel of diffusers, that is: a copy of the UNet's encoder, which adds to what the UNet's own passes on.
What it adds is multiplied by a scale for each row. Whatever else goes by the name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from diffuserve.spec import UNET
from diffuserve_export.checkpoint import CONTROLNET, Checkpoint, Part
from diffuserve_export.errors import CheckpointError
from diffuserve_export.safetensors_file import parameters_in, shapes_in
from diffuserve_export.sources import read_config
from diffuserve_export.weight_files import weight_files

__all__ = ["controlnet_from_file", "with_controlnet"]

_CLASS: Final = "ControlNetModel"
_CHANNELS: Final = 3
_SIDES: Final = "conditioning_embedding_out_channels"
_USUAL_SIDES: Final = (16, 32, 96, 256)
# What decides the shape of everything that it adds to the UNet, or that it is told beside the UNet.
_AS_THE_UNET: Final = (
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
# With one of these it takes inputs that the graph would lack.
_EXTRAS: Final = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
# What weights of a single file are called, in diffusers' layout and in the original code's.
_DIFFUSERS_KEY: Final = "controlnet_cond_embedding.conv_in.weight"
_ORIGINAL_KEYS: Final = ("input_hint_block.0.weight", "control_model.input_hint_block.0.weight")
_UNION_KEYS: Final = ("task_embedding", "control_add_embedding.linear_1.weight")


def with_controlnet(checkpoint: Checkpoint, source: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint with the ControlNet of a diffusers folder or a `.safetensors` file. Raises CheckpointError where
    it is another kind of network, or was made for a UNet of another family or width.
    """
    part = _from_file(checkpoint, source) if source.is_file() else _from_folder(source, allow_pickle)
    _check_kind(source, part.config)
    _check_fits(checkpoint, source, part.config)
    # Whatever a file is called, a copy of it makes the same export.
    files = {f"{CONTROLNET}/{'weights' if part.file else path.name}": path for path in part.files}
    return replace(checkpoint, parts={**checkpoint.parts, CONTROLNET: part}, files={**checkpoint.files, **files})


def _from_folder(folder: Path, allow_pickle: bool) -> Part:
    config = read_config(folder)
    _check_class(folder, config)
    variant, weights, parameters = weight_files(folder, CONTROLNET, allow_pickle=allow_pickle)
    return Part(CONTROLNET, _CLASS, config, variant, (folder / "config.json", *weights), parameters, folder)


def _from_file(checkpoint: Checkpoint, file: Path) -> Part:
    """A file has no config. It is taken for a copy of the checkpoint's own UNet, and its weights must fit that."""
    shapes = shapes_in(file)
    if union := [key for key in _UNION_KEYS if key in shapes]:
        raise _another(file, f"it has {union[0]}, as a union of several has")
    if _DIFFUSERS_KEY not in shapes and not any(key in shapes for key in _ORIGINAL_KEYS):
        raise _another(file, f"it has neither {_DIFFUSERS_KEY} nor {_ORIGINAL_KEYS[0]}")
    unet = checkpoint.parts[UNET].config
    config = {key: value for key, value in unet.items() if key in _config_keys()}
    config |= {"_class_name": _CLASS, "in_channels": checkpoint.latent_channels, _SIDES: _sides(shapes)}
    return Part(CONTROLNET, _CLASS, config, None, (file,), parameters_in(file), file=file)


def _config_keys() -> set[str]:
    import inspect

    from diffusers import ControlNetModel  # takes seconds, and only a single file needs it

    return set(inspect.signature(ControlNetModel.__init__).parameters)


def _sides(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The channels of the layers that bring a picture down to the latents' size."""
    if _DIFFUSERS_KEY not in shapes:
        return _USUAL_SIDES
    sides = [shapes[_DIFFUSERS_KEY][0]]
    # Every second one of these halves its input.
    while shape := shapes.get(f"controlnet_cond_embedding.blocks.{2 * len(sides) - 1}.weight"):
        sides.append(shape[0])
    return tuple(sides)


def _check_class(source: Path, config: Mapping[str, Any]) -> None:
    found = config.get("_class_name")
    if found != _CLASS:
        raise _another(source, f"it is a {found}")


def _check_kind(source: Path, config: Mapping[str, Any]) -> None:
    if config.get("global_pool_conditions"):
        raise _another(source, "its global_pool_conditions make it guide one of a picture's two rows (guess_mode)")
    if extras := [key for key in _EXTRAS if config.get(key) is not None]:
        raise _another(source, f"it has {', '.join(extras)}, and takes further inputs")
    channels = config.get("conditioning_channels", _CHANNELS)
    if channels != _CHANNELS:
        raise _another(source, f"it takes pictures of {channels} channels, and {_CHANNELS} are given")


def _another(source: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{source} cannot be built in as a ControlNet: {reason}; give one {_CLASS} of diffusers")


def _check_fits(checkpoint: Checkpoint, source: Path, config: Mapping[str, Any]) -> None:
    unet = checkpoint.parts[UNET].config
    wanted = {key: unet.get(key) for key in _AS_THE_UNET} | {"in_channels": checkpoint.latent_channels}
    defaults = {"in_channels": checkpoint.latent_channels, "layers_per_block": 2}
    found = {key: config.get(key, defaults.get(key)) for key in wanted}
    differing = [key for key in wanted if _plain(found[key]) != _plain(wanted[key])]
    if differing:
        facts = "; ".join(f"{key} is {found[key]}, and must be {wanted[key]}" for key in differing)
        raise CheckpointError(
            f"the ControlNet {source} does not fit the UNet of {checkpoint.label} ({checkpoint.family.name}): {facts}; "
            "give one that was made for its family"
        )
    scale = 2 ** (len(config.get(_SIDES) or _USUAL_SIDES) - 1)
    if scale != checkpoint.latent_scale:
        raise CheckpointError(
            f"the ControlNet {source} takes {scale} pixels for a latent, along one side, and {checkpoint.label} has "
            f"{checkpoint.latent_scale}; give one that was made for its family"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def controlnet_from_file(file: Path, model_class: Any, config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The model in float32, and the names of what the file lacks. Raises RuntimeError for weights of another shape."""
    import torch
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    model = model_class.from_config(dict(config)).to(torch.float32)
    weights = convert_controlnet_checkpoint(load_file(file), model.config)
    result = model.load_state_dict({key: value for key, value in weights.items() if value is not None}, strict=False)
    if result.unexpected_keys:
        raise CheckpointError(f"it has weights that its UNet has no place for, first {result.unexpected_keys[0]}")
    return model, sorted(result.missing_keys)
