"""A part of a checkpoint -> its model in float32, wherever the weights come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint
from torch import nn
from transformers.utils import logging as transformers_logging

from diffuserve_export.checkpoint import Checkpoint, FolderWeights, Part, RandomWeights, SingleFileWeights
from diffuserve_export.controlnet import controlnet_from_file
from diffuserve_export.errors import CheckpointError

__all__ = ["load_part"]


def load_part(checkpoint: Checkpoint, part: Part) -> nn.Module:
    """Raises CheckpointError where the weights do not fit the config, or cannot be read."""
    transformers_logging.disable_progress_bar()
    try:
        with _quiet():
            model, lacking = _load(checkpoint, part)
    except Exception as error:  # whatever either library raises for weights that do not fit their config
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the {part.name} of {checkpoint.label} cannot be loaded: {reason}{_hint(checkpoint)}"
        ) from error
    if lacking:
        raise CheckpointError(
            f"the {part.name} of {checkpoint.label} lacks weights, or has them in another shape: "
            f"{len(lacking)} of them, first {lacking[0]}{_hint(checkpoint)}"
        )
    return model


def _load(checkpoint: Checkpoint, part: Part) -> tuple[nn.Module, list[str]]:
    """The model, and the names of what was not found for it."""
    library = diffusers if hasattr(diffusers, part.class_name) else transformers
    model_class = getattr(library, part.class_name)
    if part.file:
        return controlnet_from_file(part.file, model_class, part.config)
    if part.folder:
        return _from_folder(part.folder, part, model_class)
    match checkpoint.weights:
        case FolderWeights():
            return _from_folder(checkpoint.root / part.name, part, model_class)
        case SingleFileWeights():
            return _from_single_file(checkpoint, checkpoint.weights, part, model_class)
        case RandomWeights():
            return _random(checkpoint.weights, part, model_class), []


def _hint(checkpoint: Checkpoint) -> str:
    single = isinstance(checkpoint.weights, SingleFileWeights)
    return "; if it is not built like its family's own models, give its configs with --config" if single else ""


def _from_folder(folder: Path, part: Part, model_class: Any) -> tuple[nn.Module, list[str]]:
    dtype = "dtype" if hasattr(transformers, part.class_name) else "torch_dtype"
    model, info = model_class.from_pretrained(
        folder,
        variant=part.variant,
        use_safetensors=not part.pickled,
        local_files_only=True,
        output_loading_info=True,
        **{dtype: torch.float32},
    )
    return model, sorted(info["missing_keys"]) + sorted(str(one) for one in info["mismatched_keys"])


def _from_single_file(
    checkpoint: Checkpoint, weights: SingleFileWeights, part: Part, model_class: Any
) -> tuple[nn.Module, list[str]]:
    """Through diffusers' own conversion, which fetches no config where it is given a folder of them."""
    recording = _recording(model_class)
    config = str(checkpoint.root)
    if hasattr(transformers, part.class_name):
        state = load_single_file_checkpoint(str(weights.file), local_files_only=True)
        model = create_diffusers_clip_model_from_ldm(
            recording, state, subfolder=part.name, config=config, torch_dtype=torch.float32, local_files_only=True
        )
    else:
        model = recording.from_single_file(
            str(weights.file),
            config=config,
            subfolder=part.name,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    # With accelerate installed, weights that were not found stay on the meta device.
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    return model, sorted({*recording.lacking, *absent})


def _recording(model_class: Any) -> Any:
    """`model_class`, which remembers what it was not given: diffusers' single-file loading passes over that."""

    class Recording(model_class):
        lacking: tuple[str, ...] = ()

        def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
            result = super().load_state_dict(state, strict=False)
            type(self).lacking = tuple(result.missing_keys)
            return result

    Recording.__name__ = Recording.__qualname__ = model_class.__name__
    return Recording


def _random(weights: RandomWeights, part: Part, model_class: Any) -> nn.Module:
    """As the libraries initialise a model before training, which keeps activations in any precision's range."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(weights.seed)
        if hasattr(transformers, part.class_name):
            model: nn.Module = model_class(model_class.config_class(**part.config))
        else:
            model = model_class.from_config(dict(part.config))
    return model.to(torch.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on weights that a component has no use for: what it lacks is an error anyway."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
