"""Read a safetensors file's header: enough to know that the file is whole, without loading it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from diffuserve_export.errors import CheckpointError

__all__ = ["parameters_in", "shapes_in"]

_LONGEST_HEADER = 100_000_000  # the format's own limit


def parameters_in(file: Path) -> int:
    """The number of parameters in `file`. Raises CheckpointError where it is truncated or no safetensors file."""
    return sum(math.prod(shape) for shape in shapes_in(file).values())


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in `file`. Raises CheckpointError where it is truncated or no safetensors file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes, and the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end != size:
            raise ValueError(f"it should have {end} bytes, and has {size}")
        return {name: _shape(tensor["shape"]) for name, tensor in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}; fetch it again") from error


def _shape(told: Any) -> tuple[int, ...]:
    """Raises ValueError."""
    if not isinstance(told, list) or any(type(side) is not int or side < 0 for side in told):
        raise ValueError(f"it says {str(told)[:80]} where a shape is meant")
    return tuple(told)
