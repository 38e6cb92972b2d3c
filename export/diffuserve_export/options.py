"""The options of one export, checked at construction, and the table of targets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.errors import OptionError

__all__ = ["DEFAULT_OPT_ROWS", "TARGETS", "ExportOptions", "Target"]

DEFAULT_MAX_ROWS: Final = 64
DEFAULT_OPT_ROWS: Final = 8
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_SIZES: Final = re.compile(r"(\d{1,6}):(\d{1,6}):(\d{1,6})")
_PRECISIONS: Final = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


@dataclass(frozen=True, slots=True)
class Target:
    """Where the graphs run: the precisions that are built for it (none: not built yet) and the ONNX opset."""

    name: str
    precisions: tuple[str, ...] = ()
    opset: int = 0


# Opset 23 keeps attention in one `Attention` node, which ONNX Runtime has a CPU kernel for (1.32; it is verified like
# every graph). A small UNet took the CPU time of opset 18 at 8x8 latents, and about 8 % less at 64x64.
TARGETS: Final = {
    target.name: target
    for target in (
        Target("onnxruntime-cpu", precisions=("fp32",), opset=23),
        # TensorRT-RTX refuses that node where it has no fused kernel for it: in float32, and with heads of 8.
        Target("onnxruntime", precisions=("fp32",), opset=18),
        Target("tensorrt", precisions=("fp32",), opset=18),
        Target("tensorrt-rtx", precisions=("fp32",), opset=18),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """One export: `checkpoint` (a diffusers folder, or a hub id) for `target` into the deployment folder `out`.

    `name` is the checkpoint's name in the deployment; by default it comes from `checkpoint`. `sizes` is
    "min:opt:max" in pixels, by default what the family allows for the checkpoint's own size. `max_rows` bounds
    the rows of one UNet call. `engine` is for the GPU targets. Raises OptionError.
    """

    checkpoint: str
    out: Path
    target: str = "onnxruntime-cpu"
    precision: str = "fp32"
    name: str = ""
    sizes: str = ""
    max_rows: int = DEFAULT_MAX_ROWS
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not self.checkpoint.strip():
            raise OptionError("the checkpoint is empty; give a diffusers folder or a hub id")
        self._check_target()
        if self.sizes and not _SIZES.fullmatch(self.sizes):
            raise OptionError(f"sizes is {self.sizes!r}, and must be min:opt:max in pixels, like 256:512:1024")
        if self.max_rows < 1:
            raise OptionError(f"max-rows is {self.max_rows}, and must be at least 1")
        if not _NAME.fullmatch(self.deployed_name):
            raise OptionError(
                f"the name {self.deployed_name!r} must be lower-case letters, digits, _ and -, and start with a "
                "letter or digit; give another with --name"
            )

    def _check_target(self) -> None:
        target = TARGETS.get(self.target)
        if target is None:
            raise OptionError(f"target is {self.target!r}, and must be one of {', '.join(TARGETS)}")
        if self.precision not in _PRECISIONS:
            raise OptionError(f"precision is {self.precision!r}, and must be one of {', '.join(_PRECISIONS)}")
        if self.precision not in target.precisions:
            built = [f"{one.name} in {precision}" for one in TARGETS.values() for precision in one.precisions]
            raise OptionError(f"not built yet: {self.target} in {self.precision}; use {' or '.join(built)}")
        self.engine.check_target(self.target)

    @property
    def deployed_name(self) -> str:
        """`name`, or the checkpoint's last path part in letters that Triton's model names can hold."""
        if self.name:
            return self.name
        path = Path(self.checkpoint)
        last = path.resolve().name if path.exists() else path.name
        return re.sub(r"[^a-z0-9_-]", "-", last.lower())

    @property
    def size_numbers(self) -> tuple[int, int, int] | None:
        """`sizes` as numbers, or None where the family decides."""
        match = _SIZES.fullmatch(self.sizes)
        return (int(match[1]), int(match[2]), int(match[3])) if match else None
