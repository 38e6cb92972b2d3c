"""What can be chosen of engines, checked at construction."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffuserve.gpu import RTX_CAPABILITIES
from diffuserve_export.errors import OptionError

__all__ = ["PROVIDERS", "TENSORRT", "TENSORRT_RTX", "EngineOptions", "Facts"]

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
PROVIDERS: Final = ("cuda", "tensorrt")

_CAPABILITY: Final = re.compile(r"(\d{1,2})\.?(\d)")
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of the GPU targets.

    `compute_capability` are the cards that a TensorRT-RTX engine is for, like "80,86,89,120"; each adds a copy of the
    weights. `workspace_gb` bounds what one layer may use while it runs (0: the builder's own limit). An export is
    refused where its engines need more than `memory_budget_gb` of device memory together. `cuda_graphs` adds static
    profiles, one for each row bucket at the checkpoint's own size. `provider` is ONNX Runtime's, for the target
    onnxruntime. Engines are kept in `cache`. Raises OptionError.
    """

    compute_capability: str = ""
    workspace_gb: float = 0.0
    memory_budget_gb: float = 24.0
    cuda_graphs: bool = False
    provider: str = "cuda"
    cache: Path | None = None

    def __post_init__(self) -> None:
        for one in self._capability_texts():
            match = _CAPABILITY.fullmatch(one)
            if match is None or f"{match[1]}.{match[2]}" not in RTX_CAPABILITIES:
                known = ",".join(name.replace(".", "") for name in RTX_CAPABILITIES)
                raise OptionError(
                    f"compute-capability has {one!r}, and TensorRT-RTX builds for {known}; "
                    "for another card use the target tensorrt on a machine that has it"
                )
        if self.workspace_gb < 0 or self.memory_budget_gb <= 0:
            raise OptionError(
                f"workspace is {self.workspace_gb:g} GB and memory-budget {self.memory_budget_gb:g} GB; "
                "they must be at least 0, and above 0"
            )
        if self.provider not in PROVIDERS:
            raise OptionError(f"provider is {self.provider!r}, and must be one of {', '.join(PROVIDERS)}")

    def check_target(self, target: str) -> None:
        """Raise OptionError where an option is given that `target` has no use for."""
        unused = {
            "compute-capability": bool(self.compute_capability) and target != TENSORRT_RTX,
            "cuda-graphs": self.cuda_graphs and target != TENSORRT,
            "workspace": bool(self.workspace_gb) and target not in (TENSORRT, TENSORRT_RTX),
            "provider": self.provider != PROVIDERS[0] and target != "onnxruntime",
        }
        for name, given in unused.items():
            if given:
                raise OptionError(f"{name} is given, and the target {target} has no use for it; leave it out")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """`compute_capability` as "8.9", in rising order, each once."""
        found = [_CAPABILITY.fullmatch(one) for one in self._capability_texts()]
        pairs = sorted({(int(match[1]), int(match[2])) for match in found if match})
        return tuple(f"{major}.{minor}" for major, minor in pairs)

    @property
    def cache_folder(self) -> Path:
        return (self.cache or Path(os.environ.get("DIFFUSERVE_CACHE") or "build/cache")).absolute() / "engines"

    def facts(self) -> dict[str, Any]:
        """What decides an export's output."""
        return {
            "capabilities": self.capabilities,
            "workspace_gb": self.workspace_gb,
            "cuda_graphs": self.cuda_graphs,
            "provider": self.provider,
        }

    def _capability_texts(self) -> list[str]:
        return [one.strip() for one in self.compute_capability.split(",")] if self.compute_capability else []
