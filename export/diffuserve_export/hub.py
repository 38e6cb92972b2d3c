"""Find a checkpoint: a folder or file as it is, or a hub id fetched into the hub's own cache."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from diffuserve.spec import FAMILIES, UNET
from diffuserve_export.checkpoint import SERVING_DEFAULTS
from diffuserve_export.errors import CheckpointError
from diffuserve_export.quantize.options import CALIBRATION_FILE
from diffuserve_export.weight_files import weight_name

__all__ = ["find_checkpoint", "find_controlnet"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES: Final = (".ckpt", ".pth", ".pt", ".bin")
_SMALL_FILES: Final = (
    "model_index.json",
    SERVING_DEFAULTS,
    CALIBRATION_FILE,
    "*/config.json",
    "scheduler/*.json",
    "tokenizer*/*",
)
_PARTS: Final = tuple(dict.fromkeys([UNET, "vae", *(name for one in FAMILIES.values() for name in one.encoders)]))


def find_checkpoint(checkpoint: str, *, allow_pickle: bool = False) -> Path:
    """The folder or file of `checkpoint`. Raises CheckpointError where there is none and the hub cannot give it."""
    path = Path(checkpoint).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.suffix == ".ckpt":
        raise CheckpointError(
            f"{checkpoint} is a pickle, which can run code when it is read; convert it to .safetensors"
        )
    if path.exists():
        raise CheckpointError(f"{checkpoint} is a file; give a diffusers folder, a .safetensors file or a hub id")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"there is no file {checkpoint}")
    if not _HUB_ID.fullmatch(checkpoint):
        raise CheckpointError(f"there is no folder {checkpoint}; give a diffusers folder or a hub id like owner/name")
    return _fetch(checkpoint, allow_pickle)


def find_controlnet(controlnet: str, *, allow_pickle: bool = False) -> Path:
    """The folder or file of a ControlNet. Raises CheckpointError as `find_checkpoint` does."""
    path = Path(controlnet).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{controlnet} is a pickle, which can run code when it is read; convert it to .safetensors"
        )
    if path.exists() or path.suffix == ".safetensors" or not _HUB_ID.fullmatch(controlnet):
        raise CheckpointError(
            f"{controlnet} is no ControlNet; give a diffusers folder, a .safetensors file, or a hub id like owner/name"
        )
    name = weight_name("controlnet")
    folder = _snapshot(controlnet, ["config.json", f"{name}.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(controlnet, [f"{name}.fp16.safetensors"])
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _snapshot(controlnet, [f"{name}.bin"])
    return folder


def _fetch(hub_id: str, allow_pickle: bool) -> Path:
    """Fetch only what an export reads: float32 weights, or the fp16 ones where a repository has no others."""
    folder = _snapshot(hub_id, [*_SMALL_FILES, *_patterns(_PARTS, variant="")])
    if lacking := _lacking(folder):
        folder = _snapshot(hub_id, _patterns(lacking, variant=".fp16"))
    if allow_pickle and (lacking := _lacking(folder)):
        names = [f"{part}/{weight_name(part, pickled=True)}" for part in lacking]
        folder = _snapshot(hub_id, [f"{name}{variant}.bin" for name in names for variant in ("", ".fp16")])
    return folder


def _lacking(folder: Path) -> list[str]:
    """The parts that the pipeline has and whose weights are not there. An index that cannot be read lacks none."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        has = [part for part in _PARTS if part in index]
    except (OSError, ValueError, TypeError):
        has = []
    return [part for part in has if not any((folder / part).glob("*.safetensors"))]


def _patterns(parts: Sequence[str], variant: str) -> list[str]:
    ends = (f"{variant}.safetensors", f"{variant}-*.safetensors", f".safetensors.index{variant}.json")
    return [f"{part}/{weight_name(part)}{end}" for part in parts for end in ends]


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have no common root: HTTP, DNS, offline mode, gated repositories
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {hub_id}, and the hub did not give it: {reason}; check the name and the network"
        ) from error
