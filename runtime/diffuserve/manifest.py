"""What an export made, as JSON beside the component models: all that the server needs to know of a checkpoint.

<deployment>/deployment.json                     the checkpoints by name, the default first
<deployment>/checkpoints/<name>/manifest.json    one Manifest
<deployment>/checkpoints/<name>/tokenizer.json   as the `tokenizers` library reads it
<deployment>/models/<triton model>/              component models
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from diffuserve.errors import InvalidArgumentError

__all__ = ["FORMAT_VERSION", "Component", "Deployment", "Manifest", "Range", "TensorShape"]

FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Range:
    """min, opt and max of an engine profile's dimension, and the step that values must keep to."""

    min: int
    opt: int
    max: int
    step: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.min <= self.opt <= self.max and self.step > 0):
            raise InvalidArgumentError(f"{self} is no range: it needs 0 < min <= opt <= max and a step above 0")
        if self.min % self.step or self.opt % self.step or self.max % self.step:
            raise InvalidArgumentError(f"{self}: min, opt and max must be multiples of {self.step}")

    def check(self, name: str, value: int) -> None:
        """Raise InvalidArgumentError where `value` is outside the range or between its steps."""
        if not self.min <= value <= self.max or value % self.step:
            raise InvalidArgumentError(
                f"{name} is {value}, and must be a multiple of {self.step} from {self.min} to {self.max}",
                input=name,
                value=value,
                minimum=self.min,
                maximum=self.max,
                step=self.step,
            )


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A component's tensor: dimensions are numbers, or names where they vary (`rows`, `height`)."""

    name: str
    datatype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """One component and the Triton model that serves it. `sha256` and `bytes` are of its weights and graph."""

    model: str
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One exported checkpoint.

    `key` is the hash of everything that went in. `size` bounds width and height in pixels, `latent_scale` is
    pixels per latent (8), `scheduler` is the checkpoint's own scheduler config, with its `_class_name`.
    """

    name: str
    family: str
    target: str
    precision: str
    source: str
    key: str
    size: Range
    rows: Range
    latent_channels: int
    latent_scale: int
    guidance_scale: float
    token_limit: int
    scheduler: Mapping[str, Any]
    components: Mapping[str, Component]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError where the text is not a manifest of this version."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else None
            raise ValueError(f"the manifest's format is {found}, and {FORMAT_VERSION} is read; export again")
        try:
            raw["size"], raw["rows"] = Range(**raw["size"]), Range(**raw["rows"])
            raw["components"] = {name: _component(value) for name, value in raw["components"].items()}
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the manifest lacks or has too much: {error}; export again") from error


def _component(raw: dict[str, Any]) -> Component:
    return Component(
        model=raw["model"],
        inputs=tuple(_tensor(one) for one in raw["inputs"]),
        outputs=tuple(_tensor(one) for one in raw["outputs"]),
        sha256=raw["sha256"],
        bytes=raw["bytes"],
    )


def _tensor(raw: dict[str, Any]) -> TensorShape:
    return TensorShape(raw["name"], raw["datatype"], tuple(raw["shape"]))


@dataclass(frozen=True, slots=True)
class Deployment:
    """A folder of exported checkpoints that one server serves."""

    root: Path
    checkpoints: tuple[str, ...]

    FILE: ClassVar[str] = "deployment.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def folder(self, checkpoint: str) -> Path:
        return self.root / "checkpoints" / checkpoint

    def manifest(self, checkpoint: str) -> Manifest:
        return Manifest.from_json((self.folder(checkpoint) / "manifest.json").read_text(encoding="utf-8"))

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, "checkpoints": list(self.checkpoints)}, indent=2) + "\n"

    @classmethod
    def load(cls, root: Path) -> Deployment:
        """Raises FileNotFoundError where `root` is not a deployment, ValueError where it cannot be read."""
        raw = json.loads((root / cls.FILE).read_text(encoding="utf-8"))
        if raw.get("format_version") != FORMAT_VERSION or not raw.get("checkpoints"):
            raise ValueError(f"{root / cls.FILE} names no checkpoint in format {FORMAT_VERSION}; export again")
        return cls(root, tuple(raw["checkpoints"]))
