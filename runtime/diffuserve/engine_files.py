"""An engine on disk and the facts beside it: whether this machine can run it, and if not, why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from diffuserve.errors import ComponentFailedError
from diffuserve.profiles import EngineFacts

__all__ = ["ENGINE_FILE", "FACTS_FILE", "read_facts", "refusal"]

ENGINE_FILE: Final = "model.plan"
FACTS_FILE: Final = "engine.json"


def read_facts(folder: Path) -> EngineFacts:
    """The facts beside the engine in `folder`. Raises ComponentFailedError where they are missing or damaged."""
    try:
        return EngineFacts.from_dict(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComponentFailedError(f"{folder / FACTS_FILE} cannot be read: {error}; export again") from error


def refusal(facts: EngineFacts, *, version: str, capability: str, size: int | None = None) -> str:
    """Why this machine cannot run the engine; empty where it can. `size` is the engine file's, where it was looked at.

    Engines are for the very version that built them, but for what packagers add to it.
    """
    if facts.version.split(".")[:3] != version.split(".")[:3]:
        return f"it was built with {facts.builder} {facts.version}, and {version} is here; export again with {version}"
    if capability not in facts.devices:
        return (
            f"it was built for compute capability {' and '.join(facts.devices)}, and this GPU has {capability}; "
            f"export again for {capability}"
        )
    if size is not None and size != facts.bytes:
        return f"it has {size} bytes, and {facts.bytes} were written; export again"
    return ""
