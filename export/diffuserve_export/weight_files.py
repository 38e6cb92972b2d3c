"""The weight files of one folder of a diffusers checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from diffuserve_export.errors import CheckpointError
from diffuserve_export.safetensors_file import parameters_in

__all__ = ["weight_files", "weight_name"]

_DIFFUSERS: Final = ("unet", "vae", "preview_vae", "controlnet")
_VARIANTS: Final = ((None, ""), ("fp16", ".fp16"))


def weight_name(part: str, *, pickled: bool = False) -> str:
    """What the libraries call the file, without its ending."""
    if part in _DIFFUSERS:
        return "diffusion_pytorch_model"
    return "pytorch_model" if pickled else "model"


def weight_files(folder: Path, part: str, *, allow_pickle: bool) -> tuple[str | None, list[Path], int]:
    """The variant, the files and their parameters: plain weights before fp16 ones, pickles last and only if allowed.

    Raises CheckpointError where there are none, where a shard is missing, or where a file is not whole.
    """
    name = weight_name(part)
    for variant, dotted in _VARIANTS:
        single, index = folder / f"{name}{dotted}.safetensors", folder / f"{name}.safetensors.index{dotted}.json"
        if single.is_file():
            return variant, [single], parameters_in(single)
        if index.is_file():
            shards = _shards(index)
            return variant, [index, *shards], sum(map(parameters_in, shards))
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        return _pickled(folder, part, allow_pickle)
    raise CheckpointError(f"{folder} has no weights: {name}.safetensors is missing")


def _pickled(folder: Path, part: str, allowed: bool) -> tuple[str | None, list[Path], int]:
    if not allowed:
        raise CheckpointError(
            f"{folder} holds pickled weights only, which can run code when they are read; "
            "save it with safe_serialization=True, or give --allow-pickle if you trust who made it"
        )
    for variant, dotted in _VARIANTS:
        single = folder / f"{weight_name(part, pickled=True)}{dotted}.bin"
        if single.is_file():
            # Not opened here: what it holds is known once it is loaded.
            return variant, [single], single.stat().st_size // (2 if variant else 4)
    raise CheckpointError(f"{folder} has no {weight_name(part, pickled=True)}.bin; other pickles are not read")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error}") from error
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index} names weights that are missing: {', '.join(missing) or 'none at all'}")
    return [index.parent / name for name in names]
