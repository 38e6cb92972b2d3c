"""What an export made, as JSON beside the component models: all that the server needs to know of a checkpoint.

<deployment>/deployment.json                     the checkpoints by name, the default first
<deployment>/checkpoints/<name>/manifest.json    one Manifest
<deployment>/checkpoints/<name>/tokenizer*.json  as the `tokenizers` library reads it
<deployment>/models/<triton model>/              component models
<deployment>/embeddings/                         textual inversions, which no export makes
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from diffuserve.lora.layout import LoraLayout
from diffuserve.profiles import EngineFacts, Range
from diffuserve.spec import DEFAULT_STEPS, MOST_CLIP_SKIP, PROMPT_CHUNKS, VAE_COMPONENTS

__all__ = [
    "FORMAT_VERSION",
    "Component",
    "Conditioning",
    "Deployment",
    "Encoder",
    "LatentColours",
    "Manifest",
    "Quantization",
    "Range",
    "TensorShape",
]

FORMAT_VERSION: Final = 3
# Of deployment.json, which has not changed since.
_DEPLOYMENT_VERSION: Final = 1
#: Of one call of an autoencoder without an engine's profiles, whose memory nothing else bounds: as theirs.
_VAE_PIXELS: Final = 4 * 512 * 512
_BYTES: Final = {"FP16": 2, "BF16": 2, "INT64": 8}


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A component's tensor: dimensions are numbers, or names where they vary (`rows`, `height`)."""

    name: str
    datatype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What of a component was quantized, and how its pictures compare with those in float32.

    layers      the quantized layers, by what their weights are in: int8, fp8 or int4
    left        the linear layers and convolutions that were not, by the reason
    prompts     whose prompts it was calibrated with, in `calibrated` pictures of `steps` steps
    pictures    how many were compared, of other prompts and with seeds of their own, by their PSNR in dB: `psnr` is the
                mean, `lowest` that of the worst, both None where there were none. A mean below `gate` was refused
    """

    layers: Mapping[str, tuple[str, ...]]
    left: Mapping[str, tuple[str, ...]]
    prompts: str
    calibrated: int
    steps: int
    gate: float
    pictures: int = 0
    psnr: float | None = None
    lowest: float | None = None


@dataclass(frozen=True, slots=True)
class Component:
    """One component and the Triton model that serves it.

    `sha256` and `bytes` are of its weights and graph, or of its engine; `engine` says more of that. `precision` is what
    it computes in, but for the modules named in `float32`, whose activations need the range; in a quantized one, that
    of the layers that `quantization` names, and half precision elsewhere. `lora` says what its input of that name
    holds; None where it takes no adapters.
    """

    model: str
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]
    sha256: str
    bytes: int
    engine: EngineFacts | None = None
    precision: str = "fp32"
    float32: tuple[str, ...] = ()
    quantization: Quantization | None = None
    lora: LoraLayout | None = None


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder: its component, and the file beside the manifest that reads prompts for it.

    Token ids from `vocabulary` on are of the component's input `embeddings`. `embedding_key` is what files of textual
    inversion call its vectors; "" where their only tensor is meant.
    """

    component: str
    tokenizer: str
    vocabulary: int = 49408  # CLIP's
    embedding_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """How a prompt and a picture's size become the UNet's inputs.

    encoders             their `hidden_states`, side by side on the last axis, are `encoder_hidden_states`
    text_embeds          the component whose `pooled` is the input `text_embeds`, or None: there is no such input
    time_ids             the input `time_ids`, a number each; "height" and "width" stand for the picture's, in pixels.
                         Empty: there is no such input
    zero_empty_negative  for an empty negative prompt, `hidden_states` and `pooled` are zeros instead of an encoding
    sample               what `sample` holds, channel after channel: `latents` alone, or with `mask` (one channel, 1
                         where the picture is to be made new) and `masked_latents` (the masked picture's, scaled)
    guidance_embedding   width of the input `timestep_cond`, or 0: there is no such input. Where there is one, a
                         request always takes one row, and its guidance scale s is embedded: with w = 1000 (s - 1) and
                         n = guidance_embedding // 2, f[i] = 10000 ** (-i / (n - 1)), the row is
                         sin(w f[0..n-1]), cos(w f[0..n-1]), and a zero where guidance_embedding is odd
    chunks               how many windows of `token_limit` tokens a prompt may have, ascending: `encoder_hidden_states`
                         has at most the last count's, whichever share a call
    clip_skip            the most layers of the text encoders that a request may leave out
    control              a ControlNet is built in, with the inputs `control` [rows, 3, height, width] in 0 to 1 and
                         `control_scale` [rows]; at 0 a row is as without
    """

    encoders: tuple[Encoder, ...] = (Encoder("text_encoder", "tokenizer.json"),)
    text_embeds: str | None = None
    time_ids: tuple[int | str, ...] = ()
    zero_empty_negative: bool = False
    sample: tuple[str, ...] = ("latents",)
    guidance_embedding: int = 0
    chunks: tuple[int, ...] = PROMPT_CHUNKS
    clip_skip: int = MOST_CLIP_SKIP
    control: bool = False


@dataclass(frozen=True, slots=True)
class LatentColours:
    """The colour that a latent stands for, in -1 to 1: weights [3][C] times the latent's channels, plus bias [3].

    The best linear map to what the checkpoint's own autoencoder makes of its surroundings.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One exported checkpoint.

    `key` is the hash of everything that went in. `size` bounds width and height in pixels, and `vae_size` those of
    what the autoencoder takes in one piece: larger pictures go through it in tiles. `latent_scale` is pixels per latent
    (8), `colours` are for previews, `scheduler` is the checkpoint's own scheduler config, with its `_class_name`, and
    `guidance_scale` and `steps` are of a request that gives none. `precision` is what was asked for; see components.
    """

    name: str
    family: str
    target: str
    precision: str
    source: str
    key: str
    size: Range
    vae_size: Range
    rows: Range
    latent_channels: int
    latent_scale: int
    guidance_scale: float
    token_limit: int
    scheduler: Mapping[str, Any]
    components: Mapping[str, Component]
    colours: LatentColours
    conditioning: Conditioning = Conditioning()
    steps: int = DEFAULT_STEPS
    format_version: int = FORMAT_VERSION

    def max_rows(self, component: str, width: int, height: int) -> int:
        """The most rows of one call for pictures of that size: an engine's profiles bound them by their pixels."""
        engine = self.components[component].engine
        if engine is not None:
            return engine.max_rows(self.sides(width, height))
        if component in VAE_COMPONENTS:
            return min(self.rows.max, max(1, _VAE_PIXELS // (width * height)))
        return self.rows.max

    def device_bytes(self, component: str) -> int:
        """Memory that a component takes while it is loaded.

        Of an engine, what its builder said: its weights, and activations for the most rows of its largest shape.
        Elsewhere its weights, and the inputs and outputs of its largest call: what the runtime needs between its
        layers is not known before it runs.
        """
        one = self.components[component]
        if one.engine is not None:
            return one.engine.device_bytes
        return one.bytes + max(self._call_bytes(component, side) for side in {self.size.opt, self.size.max})

    def _call_bytes(self, component: str, side: int) -> int:
        """Inputs and outputs of a call with the most rows, for pictures of `side` pixels each way."""
        if component in VAE_COMPONENTS:
            side = min(side, self.vae_size.max)
        lengths = {**self.sides(side, side), "rows": max(1, self.max_rows(component, side, side))}
        lengths["tokens"] = self.token_limit * self.conditioning.chunks[-1]

        def size(tensor: TensorShape) -> int:
            return _BYTES.get(tensor.datatype, 4) * math.prod(
                lengths.get(length, 1) if isinstance(length, str) else length for length in tensor.shape
            )

        one = self.components[component]
        return sum(map(size, (*one.inputs, *one.outputs)))

    def row_buckets(self, component: str, width: int, height: int) -> tuple[int, ...]:
        """The row counts that calls for pictures of that size should be padded to; empty where any count is as good."""
        engine = self.components[component].engine
        return () if engine is None else engine.row_buckets(self.sides(width, height))

    def sides(self, width: int, height: int) -> dict[str, int]:
        """What the sides that have a name in the components' tensors are for pictures of that size in pixels."""
        latent = {"latent_width": width // self.latent_scale, "latent_height": height // self.latent_scale}
        return {"width": width, "height": height, **latent}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError where the text is not a manifest of this version."""
        raw = _object(text)
        if (found := raw.get("format_version")) != FORMAT_VERSION:
            raise ValueError(f"the manifest's format is {found}, and {FORMAT_VERSION} is read; export again")
        try:
            raw.update({name: Range(**raw[name]) for name in ("size", "vae_size", "rows")})
            raw["colours"] = LatentColours(tuple(map(tuple, raw["colours"]["weights"])), tuple(raw["colours"]["bias"]))
            raw["components"] = {name: _component(value) for name, value in raw["components"].items()}
            raw["conditioning"] = _conditioning(raw["conditioning"])
            return cls(**raw)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest lacks or has too much: {error}; export again") from error


def _object(text: str) -> dict[str, Any]:
    """A JSON object; an empty one where it is something else. Raises ValueError."""
    try:
        raw = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply; export again") from error
    return raw if isinstance(raw, dict) else {}


def _component(raw: dict[str, Any]) -> Component:
    return Component(
        model=raw["model"],
        inputs=tuple(_tensor(one) for one in raw["inputs"]),
        outputs=tuple(_tensor(one) for one in raw["outputs"]),
        sha256=raw["sha256"],
        bytes=raw["bytes"],
        engine=EngineFacts.from_dict(raw["engine"]) if raw.get("engine") else None,
        precision=raw["precision"],
        float32=tuple(raw["float32"]),
        quantization=_quantization(raw["quantization"]) if raw.get("quantization") else None,
        lora=LoraLayout.from_dict(raw["lora"]) if raw.get("lora") else None,
    )


def _quantization(raw: dict[str, Any]) -> Quantization:
    names = {part: {key: tuple(values) for key, values in raw[part].items()} for part in ("layers", "left")}
    return Quantization(**{**raw, **names})


def _conditioning(raw: dict[str, Any]) -> Conditioning:
    encoders = tuple(Encoder(**one) for one in raw["encoders"])
    lists = {name: tuple(raw[name]) for name in ("time_ids", "sample", "chunks")}
    return Conditioning(**{**raw, **lists, "encoders": encoders})


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

    @property
    def embeddings(self) -> Path:
        """Where textual inversions are looked for, unless another folder is given to the server."""
        return self.root / "embeddings"

    @property
    def loras(self) -> Path:
        """Where LoRAs are looked for, unless another folder is given to the server."""
        return self.root / "loras"

    def folder(self, checkpoint: str) -> Path:
        return self.root / "checkpoints" / checkpoint

    def manifest(self, checkpoint: str) -> Manifest:
        return Manifest.from_json((self.folder(checkpoint) / "manifest.json").read_text(encoding="utf-8"))

    def lacking(self, component: Component) -> str:
        """What keeps a component's model from being loaded, as far as its files tell without being read; else empty."""
        folder = self.models / component.model
        found = sum(file.stat().st_size for file in folder.glob("*/*") if file.is_file())
        if found >= component.bytes:
            return ""
        return (
            f"{folder} holds {found} bytes, and {component.bytes} were exported: its model is missing or not whole; "
            "export again"
        )

    def to_json(self) -> str:
        return (
            json.dumps({"format_version": _DEPLOYMENT_VERSION, "checkpoints": list(self.checkpoints)}, indent=2) + "\n"
        )

    @classmethod
    def load(cls, root: Path) -> Deployment:
        """Raises FileNotFoundError where `root` is not a deployment, ValueError where it cannot be read."""
        raw = _object((root / cls.FILE).read_text(encoding="utf-8"))
        names = raw.get("checkpoints") if raw.get("format_version") == _DEPLOYMENT_VERSION else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{root / cls.FILE} names no checkpoint in format {_DEPLOYMENT_VERSION}; export again")
        return cls(root, tuple(names))
