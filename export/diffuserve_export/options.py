"""The options of one export, checked at construction, and the table of targets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from diffuserve.spec import FAMILIES
from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.errors import OptionError
from diffuserve_export.quantize.options import QuantizeOptions

__all__ = [
    "DECOMPOSED_ATTENTION",
    "DEFAULT_OPT_ROWS",
    "GRAPH_PRECISIONS",
    "QUANTIZED",
    "TARGETS",
    "WHOLE_ATTENTION",
    "ExportOptions",
    "Target",
]

DEFAULT_MAX_ROWS: Final = 64
DEFAULT_OPT_ROWS: Final = 8
_MOST_LORA_RANK: Final = 128
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_SIZES: Final = re.compile(r"(\d{1,6}):(\d{1,6}):(\d{1,6})")
#: Precisions of a whole graph.
GRAPH_PRECISIONS: Final = ("fp32", "fp16", "bf16")
#: Precisions of a UNet's layers; what is left of the checkpoint is in fp16.
QUANTIZED: Final = ("int8", "fp8", "int4")
_PRECISIONS: Final = (*GRAPH_PRECISIONS, *QUANTIZED)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the graphs run: the ONNX opset, and the precisions that are built for it (none: not built yet)."""

    name: str
    opset: int
    precisions: tuple[str, ...] = ()


#: The opset whose attention is one node, and one that has no such node, so that attention is the operators that it is
#: made of. `make bench-attention` compares them, and docs/export.md has its tables: TensorRT-RTX has fused kernels for
#: both in half precision, and refuses the node in float32 and for the autoencoder's wide head.
WHOLE_ATTENTION: Final = 23
DECOMPOSED_ATTENTION: Final = 18
TARGETS: Final = {
    target.name: target
    for target in (
        Target("onnxruntime-cpu", opset=WHOLE_ATTENTION, precisions=("fp32", "fp16")),
        Target("onnxruntime", opset=DECOMPOSED_ATTENTION, precisions=GRAPH_PRECISIONS),
        Target("tensorrt", opset=DECOMPOSED_ATTENTION, precisions=_PRECISIONS),
        Target("tensorrt-rtx", opset=DECOMPOSED_ATTENTION, precisions=_PRECISIONS),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """One export for `target` into the deployment folder `out`.

    `checkpoint` is a diffusers folder, a `.safetensors` file or a hub id. Or else `random_weights` makes the
    full-size models of `family`; beside a checkpoint, `family` is what it must be. `config` is a diffusers folder with
    the configs of a single file, by default those of its family's own models. `name` is the checkpoint's name in the
    deployment; by default it comes from the checkpoint. `sizes` is "min:opt:max" in pixels, by default what the
    family allows for the checkpoint's own size. `max_rows` bounds the rows of one UNet call. `vae_tile` is the largest
    side in pixels that the autoencoder takes in one piece, by default what the family allows; larger pictures go
    through it in tiles. `preview_vae` is the folder of a diffusers AutoencoderTiny for previews. With a `lora_rank`,
    UNet and text encoders take LoRA adapters of that rank as inputs. `controlnet` is a ControlNet that is built into
    the UNet: a diffusers folder, a `.safetensors` file or a hub id. `vae_precision` is the autoencoder's, by default
    `precision`, or fp32 where the family's overflows in fp16. `engine` is for the GPU targets, `quantize` for the
    quantized precisions. Raises OptionError.
    """

    out: Path
    checkpoint: str = ""
    family: str = ""
    random_weights: bool = False
    config: Path | None = None
    allow_pickle: bool = False
    target: str = "onnxruntime-cpu"
    precision: str = "fp32"
    vae_precision: str = ""
    name: str = ""
    sizes: str = ""
    max_rows: int = DEFAULT_MAX_ROWS
    vae_tile: int = 0
    preview_vae: Path | None = None
    lora_rank: int = 0
    controlnet: str = ""
    engine: EngineOptions = field(default_factory=EngineOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)

    def __post_init__(self) -> None:
        self._check_source()
        self._check_target()
        if self.sizes and not _SIZES.fullmatch(self.sizes):
            raise OptionError(f"sizes is {self.sizes!r}, and must be min:opt:max in pixels, like 256:512:1024")
        if self.max_rows < 1:
            raise OptionError(f"max-rows is {self.max_rows}, and must be at least 1")
        if self.vae_tile < 0:
            raise OptionError(f"vae-tile is {self.vae_tile}, and must be pixels, or 0 for what the family allows")
        if not 0 <= self.lora_rank <= _MOST_LORA_RANK:
            raise OptionError(
                f"lora-rank is {self.lora_rank}, and must be 1 to {_MOST_LORA_RANK}, or 0 for engines without adapters"
            )
        if self.lora_rank and self.engine.cuda_graphs:
            raise OptionError(
                "CUDA graphs are for calls of one shape, and with a lora-rank the number of adapters varies; leave out "
                "cuda-graphs or lora-rank"
            )
        if self.preview_vae and not self.preview_vae.is_dir():
            raise OptionError(
                f"preview-vae is {self.preview_vae}, and must be the folder of a diffusers AutoencoderTiny"
            )
        if not _NAME.fullmatch(self.deployed_name):
            raise OptionError(
                f"the name {self.deployed_name!r} must be lower-case letters, digits, _ and -, and start with a "
                "letter or digit; give another with --name"
            )

    def _check_source(self) -> None:
        if self.family and self.family not in FAMILIES:
            raise OptionError(f"family is {self.family!r}, and must be one of {', '.join(FAMILIES)}")
        if self.random_weights and self.checkpoint.strip():
            raise OptionError(f"random weights are for a family, and the checkpoint {self.checkpoint} has its own")
        if self.random_weights and not self.family:
            raise OptionError(f"random weights need a family: one of {', '.join(FAMILIES)}")
        if not self.random_weights and not self.checkpoint.strip():
            raise OptionError(
                "the checkpoint is empty; give a diffusers folder, a .safetensors file or a hub id, or a family with "
                "random weights"
            )
        if self.config and not self.config.is_dir():
            raise OptionError(f"config is {self.config}, and must be a diffusers folder")

    def _check_target(self) -> None:
        if self.target not in TARGETS:
            raise OptionError(f"target is {self.target!r}, and must be one of {', '.join(TARGETS)}")
        if self.precision not in _PRECISIONS:
            raise OptionError(f"precision is {self.precision!r}, and must be one of {', '.join(_PRECISIONS)}")
        if self.vae_precision and self.vae_precision not in GRAPH_PRECISIONS:
            allowed = ", ".join(GRAPH_PRECISIONS)
            raise OptionError(f"vae-precision is {self.vae_precision!r}, and must be one of {allowed}")
        wanted = {self.precision, self.vae_precision or self.precision}
        if lacking := sorted(wanted - set(TARGETS[self.target].precisions)):
            built = [f"{one.name} in {precision}" for one in TARGETS.values() for precision in one.precisions]
            raise OptionError(f"not built yet: {self.target} in {lacking[0]}; use {' or '.join(built)}")
        self.engine.check_target(self.target)
        if self.controlnet and self.precision in QUANTIZED:
            raise OptionError(
                f"not built: a ControlNet in {self.precision}, since what it is calibrated with has no control; export "
                f"it in {' or '.join(GRAPH_PRECISIONS)}"
            )
        if self.precision not in QUANTIZED and self.quantize != QuantizeOptions():
            raise OptionError(
                "calibration, calibration-steps, quality-gate and quality-pictures are for the precisions "
                f"{', '.join(QUANTIZED)}, and precision is {self.precision}; leave them out"
            )

    @property
    def deployed_name(self) -> str:
        """`name`, or the checkpoint's last path part, or the family, in letters that Triton's model names can hold."""
        if self.name or self.random_weights:
            return self.name or self.family
        path = Path(self.checkpoint)
        last = path.resolve().name if path.exists() else path.name
        return re.sub(r"[^a-z0-9_-]", "-", last.removesuffix(".safetensors").lower())

    @property
    def source(self) -> str:
        """What is exported, for the manifest."""
        source = f"{self.family}, random weights" if self.random_weights else self.checkpoint
        return f"{source} with the ControlNet {self.controlnet}" if self.controlnet else source

    @property
    def size_numbers(self) -> tuple[int, int, int] | None:
        """`sizes` as numbers, or None where the family decides."""
        match = _SIZES.fullmatch(self.sizes)
        return (int(match[1]), int(match[2]), int(match[3])) if match else None
