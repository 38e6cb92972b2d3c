"""What can be chosen of a quantized export, and the prompts that it is calibrated and judged with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import ExportError, OptionError

__all__ = ["CALIBRATION_FILE", "QuantizeOptions", "QuantizePlan", "plan_quantization"]

#: A checkpoint may bring prompts of its own: those of its trade, where the built-in list is of everything.
CALIBRATION_FILE: Final = "calibration.txt"
_BUILT_IN: Final = Path(__file__).parent / "prompts.txt"
_PACKAGE: Final = "nvidia-modelopt"
_MOST_STEPS: Final = 150
_MOST_PICTURES: Final = 1000
_MOST_DECIBELS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """Options of the quantized precisions.

    `calibration` is a text file with a prompt on each line, by default the checkpoint's own, or a built-in list.
    `steps` are those of a picture in calibration and judgement, by default the checkpoint's. `pictures` are compared
    with float32's, 0 for none; an export is refused where their mean PSNR is below `gate` (dB). Raises OptionError.
    """

    calibration: Path | None = None
    steps: int = 0
    gate: float = 20.0
    pictures: int = 8

    def __post_init__(self) -> None:
        if self.calibration is not None and not self.calibration.is_file():
            raise OptionError(f"there is no file {self.calibration}; give a text file with a prompt on each line")
        bounds = {
            "calibration-steps": (self.steps, _MOST_STEPS),
            "quality-pictures": (self.pictures, _MOST_PICTURES),
            "quality-gate": (self.gate, _MOST_DECIBELS),
        }
        for name, (value, most) in bounds.items():
            if not 0 <= value <= most:
                raise OptionError(f"{name} is {value:g}, and must be from 0 to {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """What decides a quantization, with every default filled in: the options, the prompts, and ModelOpt's version.

    Scales are found on a picture of each prompt in `calibration`; pictures of those in `judged` are compared.
    `source` says whose prompts they are.
    """

    source: str
    calibration: tuple[str, ...]
    judged: tuple[str, ...]
    steps: int
    gate: float
    pictures: int
    version: str


def plan_quantization(checkpoint: Checkpoint, options: QuantizeOptions) -> QuantizePlan:
    """Prompts are the user's, else the checkpoint's, else the built-in ones. Their last quarter is for judging.

    Raises OptionError for a file that cannot be read or has fewer than two prompts, ExportError without ModelOpt.
    """
    source, prompts = _prompts(checkpoint, options)
    kept = max(1, len(prompts) // 4)
    return QuantizePlan(
        source=source,
        calibration=prompts[:-kept],
        judged=prompts[-kept:],
        steps=options.steps or checkpoint.steps,
        gate=options.gate,
        pictures=options.pictures,
        version=_version(),
    )


def _prompts(checkpoint: Checkpoint, options: QuantizeOptions) -> tuple[str, tuple[str, ...]]:
    own = checkpoint.root / CALIBRATION_FILE
    path, source = (options.calibration, str(options.calibration)) if options.calibration else (own, CALIBRATION_FILE)
    if not path.is_file():
        path, source = _BUILT_IN, "built-in"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path} cannot be read ({error}); give a UTF-8 text file with a prompt on each line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if len(prompts) < 2:
        raise OptionError(f"{path} has {len(prompts)} prompts, and needs 2: one to calibrate with, one to judge by")
    return source, prompts


def _version() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError as error:
        raise ExportError(
            f"quantized precisions need the Python package {_PACKAGE}; pip install 'diffuserve[quantize]'"
        ) from error
