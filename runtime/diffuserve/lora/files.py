"""Files of LoRA, parsed within limits: the names and forms that trainers write, and what of them can be expressed.

Four kinds of names are read. Of a layer `down_blocks.0.attentions.0.proj_in`:

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight          PEFT's and diffusers'; also .lora.down, .lora_down
    unet.down_blocks.0...attn1.processor.to_q_lora.down.weight     diffusers' older ones
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight  kohya's, with `.alpha`
    lora_unet_input_blocks_1_1_proj_in.lora_down.weight            the same with names of the original UNet, as for SDXL

Every dot of a name becomes an underscore here, so that all of them are one. Text encoders are `text_encoder.` and
`text_encoder_2.`, or `lora_te_`, `lora_te1_` and `lora_te2_`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import safetensors.torch
import torch

from diffuserve.spec import TEXT_ENCODER, TEXT_ENCODER_2, UNET

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_RANK",
    "LoraFile",
    "LoraModule",
    "Place",
    "listed",
    "parse_lora_file",
    "parse_lora_header",
]

#: A LoRA of rank 128 for all layers of SDXL takes 700 MB in half precision.
MAX_FILE_BYTES: Final = 1 << 30
MAX_RANK: Final = 256
#: Trainers' notes are in the header, too; those of large data sets take a megabyte.
MAX_HEADER_BYTES: Final = 4 << 20
_MAX_TENSORS: Final = 10_000
#: Factors of trained files are below 10.
_MAX_VALUE: Final = 10_000.0
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMED_LAYERS: Final = 5  # in an error's message
_MOST_PARTS: Final = 64  # between underscores; real names have 13

_FACTOR: Final = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<factor>A|B|down|up)(?:\.\w+)?\.weight", re.ASCII
)
_ALPHA: Final = re.compile(r"(?P<layer>.+)\.alpha", re.ASCII)
#: Of a layer, its name and what makes it more than two factors.
_OTHER: Final = re.compile(
    r"(?P<layer>.+?)[._](?P<kind>dora_scale|lora_magnitude|lora_mid|hada|lokr|oft|diff|lora)", re.ASCII
)
_KINDS: Final = {
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "lora_mid": "a convolution in three factors",
    "hada": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "diff": "whole weights",
    "lora": "biases",
}
_PARTS: Final = (
    ("text_encoder_2.", TEXT_ENCODER_2),
    ("text_encoder.", TEXT_ENCODER),
    ("unet.", UNET),
    ("lora_te2_", TEXT_ENCODER_2),
    ("lora_te1_", TEXT_ENCODER),
    ("lora_te_", TEXT_ENCODER),
    ("lora_unet_", UNET),
    ("model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("text_model.", TEXT_ENCODER),
)
_PEFT: Final = "base_model.model."
_METADATA: Final = "lora_adapter_metadata"  # diffusers', where PEFT's config of every part is


class Place(NamedTuple):
    """A layer as files name it: its component, and its name there with underscores for dots."""

    component: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """What is added to one layer's weight: scale * up @ down, with `down` [rank, in] and `up` [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """A parsed file, in the precision that it has. `digest` is the SHA-256 of its bytes."""

    digest: str
    modules: Mapping[Place, LoraModule]

    @property
    def bytes(self) -> int:
        return sum(one.down.nbytes + one.up.nbytes for one in self.modules.values())


def parse_lora_file(content: bytes) -> LoraFile:
    """Raises ValueError with what is wrong with the file, and the names of the layers that it is about."""
    length = _header_length(content)
    try:
        tensors = safetensors.torch.load(content)
        configs = _configs(json.loads(content[8 : 8 + length]))
    except Exception as error:  # SafetensorError, and others for what its header may say
        raise ValueError(f"is no safetensors file, or not whole ({error})") from error
    modules = _modules(tensors, configs)
    for place, module in modules.items():
        _check_values(place, module)
    return LoraFile(hashlib.sha256(content).hexdigest(), modules)


def parse_lora_header(content: bytes, size: int) -> LoraFile:
    """What the first bytes of a file of `size` tell, its header's length and its header.

    The factors are zeros, which take no memory, and so is every alpha; there is no digest. Raises ValueError as
    `parse_lora_file` does, but for what only the numbers tell.
    """
    length = _header_length(content)
    try:
        header = json.loads(content[8 : 8 + length])
        configs = _configs(header)
        tensors = {name: _zeros(one) for name, one in header.items() if name != "__metadata__"}
        end = max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
    except Exception as error:  # whatever the header may say
        raise ValueError(f"is no safetensors file, or not whole ({error})") from error
    if end != size - 8 - length:
        raise ValueError("is no safetensors file, or not whole")
    return LoraFile("", _modules(tensors, configs))


def _header_length(content: bytes) -> int:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("is no safetensors file, or not whole")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes, and at most {MAX_HEADER_BYTES} are read")
    return length


def _configs(header: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config of every part, as "part.key"."""
    configs = json.loads((header.get("__metadata__") or {}).get(_METADATA) or "{}")
    return configs if isinstance(configs, dict) else {}


def _zeros(told: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of zeros as the header tells of one; of a type that no factor has, where it has none that one may."""
    return torch.zeros((), dtype=_DTYPES.get(told["dtype"], torch.float64)).expand(told["shape"])


def _modules(tensors: Mapping[str, torch.Tensor], configs: Mapping[str, Any]) -> dict[Place, LoraModule]:
    if not 0 < len(tensors) <= _MAX_TENSORS:
        raise ValueError(f"has {len(tensors)} tensors, and must have 1 to {_MAX_TENSORS}")
    factors, alphas = _sorted(tensors)
    _check_convolutions(factors)
    scales = _Scales(configs, alphas)
    modules = {place: _module(place, pair, scales) for place, pair in factors.items()}
    if orphans := [place for place in alphas if place not in modules]:
        raise ValueError(f"has an alpha and no factors for {listed(orphans)}")
    return modules


_Pairs = dict[Place, dict[str, torch.Tensor]]


def _sorted(tensors: Mapping[str, torch.Tensor]) -> tuple[_Pairs, dict[Place, float]]:
    """The factors, `down` and `up`, and the alphas, by layer."""
    factors, alphas, others = _Pairs(), dict[Place, float](), dict[str, list[str]]()
    for key, tensor in tensors.items():
        if found := _FACTOR.fullmatch(key):
            which = {"A": "down", "B": "up"}.get(found["factor"], found["factor"])
            pair = factors.setdefault(_place(found["layer"]), {})
            if which in pair:
                raise ValueError(f"has the layer {key[:128]!r} twice, under two names")
            pair[which] = tensor
        elif (found := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            place = _place(found["layer"])
            alphas[place] = _alpha(tensor, place)
        else:
            other = _OTHER.match(key)
            kind, layer = (_KINDS[other["kind"]], other["layer"]) if other else ("no LoRA", key)
            others.setdefault(kind, []).append(layer)
    if others:
        kinds = "; ".join(f"{kind} ({listed(sorted(set(layers)))})" for kind, layers in others.items())
        raise ValueError(f"holds what two factors a layer cannot express: {kinds}")
    return factors, alphas


def _place(layer: str) -> Place:
    """A layer's place, by what its name in a file is before the factor's."""
    layer = layer.removeprefix(_PEFT)
    prefix, component = next(((text, part) for text, part in _PARTS if layer.startswith(text)), ("", UNET))
    name = layer.removeprefix(prefix).replace(".", "_")
    if component == UNET:
        name = name.replace("_processor_", "_")
        return Place(component, f"{name}_0" if name.endswith("_to_out") else name)
    name = re.sub(r"_attn_to_(q|k|v|out)$", r"_attn_\1_proj", name)
    return Place(component, name.removeprefix("text_model_"))


class _Scales:
    """What a layer's product is multiplied by: alpha / rank, by the file's alphas or PEFT's config of the component."""

    def __init__(self, configs: Mapping[str, Any], alphas: Mapping[Place, float]) -> None:
        self._configs, self._alphas = configs, alphas
        if any(key.endswith(".use_dora") and value for key, value in configs.items()):
            raise ValueError("holds what two factors a layer cannot express: DoRA")
        self._patterns = {part: _patterns(part, configs) for part in (UNET, TEXT_ENCODER, TEXT_ENCODER_2)}

    def of(self, place: Place, rank: int) -> float:
        prefix = place.component
        if place in self._alphas:
            alpha = self._alphas[place]
        elif f"{prefix}.lora_alpha" in self._configs:
            alpha = _alpha(self._named(place, self._configs[f"{prefix}.lora_alpha"]), place)
        else:
            return 1.0
        scale = alpha / (math.sqrt(rank) if self._configs.get(f"{prefix}.use_rslora") else rank)
        if not abs(scale) <= _MAX_VALUE:  # written so that a NaN fails
            raise ValueError(f"has an alpha of {alpha:g} for {listed([place])}, at a rank of {rank}")
        return scale

    def _named(self, place: Place, default: Any) -> Any:
        """What the first of the patterns says that the layer's name ends with."""
        parts = place.name.rsplit("_", _MOST_PARTS)
        patterns = self._patterns[place.component]
        ends = ("_".join(parts[start:]) for start in range(len(parts)))
        found = [patterns[end] for end in ends if end in patterns]
        return min(found, key=lambda one: one[0])[1] if found else default


def _patterns(component: str, configs: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """PEFT's alphas of single layers, with their order: by the last parts of a layer's name, which are whole there."""
    told = configs.get(f"{component}.alpha_pattern") or {}
    if not isinstance(told, dict):
        raise ValueError(f"has an alpha_pattern for {component} that is {str(told)[:80]!r}, and must name layers")
    patterns = dict[str, tuple[int, Any]]()
    for order, (key, value) in enumerate(told.items()):
        patterns.setdefault(key.replace(".", "_").removeprefix("text_model_"), (order, value))
    return patterns


def _alpha(value: Any, place: Place) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"has an alpha of {str(value)[:80]} for {listed([place])}, which is no finite number"
        ) from error


def _module(place: Place, pair: Mapping[str, torch.Tensor], scales: _Scales) -> LoraModule:
    if len(pair) < 2:
        raise ValueError(f"has one factor of two for {listed([place])}")
    down, up = (_matrix(place, pair[which]) for which in ("down", "up"))
    rank = len(down)
    if up.shape[1] != rank or not 0 < rank <= MAX_RANK:
        raise ValueError(
            f"has factors of shapes {list(down.shape)} and {list(up.shape)} for {listed([place])}, and must have "
            f"[rank, in] and [out, rank] with a rank of 1 to {MAX_RANK}"
        )
    return LoraModule(down, up, scales.of(place, rank))


def _check_convolutions(factors: _Pairs) -> None:
    for_convolutions = ((place, one) for place, pair in factors.items() for one in pair.values() if one.ndim == 4)
    wide = sorted({place for place, one in for_convolutions if tuple(one.shape[2:]) != (1, 1)})
    if wide:
        raise ValueError(f"changes convolutions that are not of 1x1 (LoCon), which no adapter can: {listed(wide)}")


def _matrix(place: Place, tensor: torch.Tensor) -> torch.Tensor:
    """A factor as a matrix; of a 1x1 convolution without its last two sides."""
    if tensor.dtype not in _DTYPES.values():
        raise ValueError(
            f"has values in {tensor.dtype} for {listed([place])}, and float32, float16 and bfloat16 are read"
        )
    if tensor.ndim not in (2, 4) or not tensor.numel():
        raise ValueError(f"has a factor of shape {list(tensor.shape)} for {listed([place])}")
    return tensor.flatten(1)


def _check_values(place: Place, module: LoraModule) -> None:
    for factor in (module.down, module.up):
        if not factor.abs().max() <= _MAX_VALUE:  # written so that a NaN fails
            raise ValueError(f"has values that are not finite, or beyond {_MAX_VALUE:g}, for {listed([place])}")


def listed(layers: list[Place] | list[str]) -> str:
    """Layers in words, the first few of many."""
    names = [".".join(one) if isinstance(one, Place) else one for one in layers]
    more = f" and {len(names) - _NAMED_LAYERS} more" if len(names) > _NAMED_LAYERS else ""
    return ", ".join(name[:128] for name in names[:_NAMED_LAYERS]) + more
