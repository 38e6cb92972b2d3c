"""Find a checkpoint: a folder as it is, or a hub id fetched into the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from diffuserve_export.checkpoint import SERVING_DEFAULTS
from diffuserve_export.errors import CheckpointError

__all__ = ["find_checkpoint"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES: Final = ("model_index.json", SERVING_DEFAULTS, "*/config.json", "scheduler/*.json", "tokenizer/*")
_WEIGHTS: Final = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def find_checkpoint(checkpoint: str) -> Path:
    """The folder of `checkpoint`. Raises CheckpointError where there is none and the hub cannot give it."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix in (".safetensors", ".ckpt"):
        raise CheckpointError(f"not built yet: single files like {checkpoint}; give a diffusers folder")
    if folder.exists():
        raise CheckpointError(f"{checkpoint} is a file; give a diffusers folder or a hub id")
    if not _HUB_ID.fullmatch(checkpoint):
        raise CheckpointError(f"there is no folder {checkpoint}; give a diffusers folder or a hub id like owner/name")
    return _fetch(checkpoint)


def _fetch(hub_id: str) -> Path:
    """Fetch only what an export reads: float32 weights, or the fp16 ones where a repository has no others."""
    folder = _snapshot(hub_id, [*_SMALL_FILES, *_patterns(_WEIGHTS, variant="")])
    lacking = [part for part in _WEIGHTS if not any((folder / part).glob("*.safetensors"))]
    return _snapshot(hub_id, _patterns(lacking, variant=".fp16")) if lacking else folder


def _patterns(parts: Sequence[str] | dict[str, str], variant: str) -> list[str]:
    names = [(part, f"{part}/{_WEIGHTS[part]}") for part in parts]
    ends = (f"{variant}.safetensors", f"{variant}-*.safetensors", f".safetensors.index{variant}.json")
    return [f"{name}{end}" for _, name in names for end in ends]


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have no common root: HTTP, DNS, offline mode, gated repositories
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {hub_id}, and the hub did not give it: {reason}; check the name and the network"
        ) from error
