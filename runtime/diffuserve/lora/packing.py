"""Parsed files -> the numbers of an adapter: each layer's factors at their place in the vector, weights folded in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from diffuserve.lora.choice import LoraKey
from diffuserve.lora.files import LoraFile, LoraModule, Place, listed
from diffuserve.lora.layout import LoraFactors, LoraLayout, LoraTarget
from diffuserve.spec import UNET

__all__ = ["Adapter", "Fitted", "Places", "Share", "packed", "required_rank"]

#: By a layer's path in its component.
Fitted = Mapping[str, Mapping[str, LoraModule]]

_UP_BLOCK: Final = re.compile(r"up_blocks_\d+_attentions_(\d+)_")
_BLOCK: Final = re.compile(r"(down|mid|up)_blocks?_(?:(\d+)_)?attentions_(\d+)_(.+)")
_TEXT_MODEL: Final = "text_model_"


class Places:
    """Where the layers that files name are in a checkpoint's layouts, by component."""

    def __init__(self, layouts: Mapping[str, LoraLayout]) -> None:
        self._targets: dict[Place, LoraTarget] = {}
        for component, layout in layouts.items():
            for target in layout.targets:
                name = target.path.replace(".", "_")
                self._targets[Place(component, name.removeprefix(_TEXT_MODEL))] = target
        # What the original UNet calls layers of a diffusers UNet with as many in each block. Beside a block's resnets
        # and transformers it counts the sampler between blocks.
        found = [_UP_BLOCK.match(place.name) for place in self._targets if place.component == UNET]
        layers = 1 + max((int(one[1]) for one in found if one), default=0)
        for place, target in list(self._targets.items()):
            if place.component == UNET and (other := _original(place.name, layers)):
                self._targets[Place(UNET, other)] = target

    def fit(self, file: LoraFile) -> Fitted:
        """The file's modules by their paths. Raises ValueError with the layers that have no place here."""
        fitted: dict[str, dict[str, LoraModule]] = {}
        unknown, other = list[Place](), list[str]()
        for place, module in file.modules.items():
            target = self._targets.get(place)
            if target is None:
                unknown.append(place)
                continue
            widths, wanted = (module.down.shape[1], len(module.up)), (target.in_features, target.out_features)
            if widths != wanted:
                other.append(f"{target.path} ({widths[0]} to {widths[1]}, and not {wanted[0]} to {wanted[1]})")
            if target.path in fitted.setdefault(place.component, {}):
                raise ValueError(f"has the layer {target.path} twice, under two names")
            fitted[place.component][target.path] = module
        if other:
            raise ValueError(f"was made for layers of other widths: {listed(other)}")
        if unknown:
            raise ValueError(
                f"changes {len(unknown)} of {len(file.modules)} layers that no adapter of this checkpoint can change: "
                f"{listed(unknown)}"
            )
        return fitted


def _original(name: str, layers: int) -> str | None:
    """The original UNet's name of a transformer's layer."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None
    side, block, position, rest = found[1], int(found[2] or 0), int(found[3]), found[4]
    if side == "mid":
        return f"middle_block_1_{rest}"
    number = block * layers + position
    return f"input_blocks_{1 + number}_1_{rest}" if side == "down" else f"output_blocks_{number}_1_{rest}"


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One file's part in an adapter. `is_truncated`: it may be cut down to the rank that the others leave."""

    fitted: Fitted
    weight: float
    is_truncated: bool


@dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRAs of a request as the engines take them. Held weakly where equal requests find it.

    `vectors` [P] are by component, in each one's precision; components that it does not change have none. `error` is
    the Frobenius norm of what truncation left out of the truncated files' products, as a share of theirs.
    """

    key: LoraKey
    vectors: Mapping[str, torch.Tensor]
    error: float

    def told(self, loras: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
        """A request's `loras` with the error of those that were truncated."""
        error = {"truncation_error": round(self.error, 6)}
        return tuple({**one, **(error if one["truncated"] else {})} for one in loras)


def required_rank(shares: Sequence[Share], layout: LoraLayout, component: str) -> int:
    """The rank that a layer must have for these files: all of those that are not truncated, and 1 for the others."""
    needed = 0
    for target in layout.targets:
        modules = [(one.fitted.get(component, {}).get(target.path), one.is_truncated) for one in shares]
        whole = sum(module.rank for module, is_truncated in modules if module and not is_truncated)
        needed = max(needed, whole + any(module and is_truncated for module, is_truncated in modules))
    return needed


def packed(
    key: LoraKey, shares: Sequence[Share], layouts: Mapping[str, LoraLayout], dtypes: Mapping[str, torch.dtype]
) -> Adapter:
    """The files together: their ranks stacked, which adds up what they do.

    Raises ValueError where a rank does not fit, or a number not into the engine's precision.
    """
    vectors, lost, whole = dict[str, torch.Tensor](), 0.0, 0.0
    for component, layout in layouts.items():
        used = [one for one in shares if component in one.fitted]
        if not used:
            continue
        vector = torch.zeros(layout.size)
        for path, factors in layout.factors(vector).items():
            kept, cut = _modules(used, component, path)
            free = layout.rank - sum(module.rank for module, _ in kept)
            pairs = list(_scaled(kept))
            if cut:
                pair, left_out, norm = _truncated(list(_scaled(cut)), free)
                pairs.append(pair)
                lost, whole = lost + left_out, whole + norm
            _write(factors, pairs)
        vectors[component] = vector.to(dtypes[component])
        if not vectors[component].isfinite().all():
            raise ValueError(f"overflows in {dtypes[component]}; give it a smaller weight")
    return Adapter(key, vectors, (lost / whole) ** 0.5 if whole else 0.0)


_Weighted = list[tuple[LoraModule, float]]
#: down [rank, in] and up [out, rank], float32
_Pair = tuple[torch.Tensor, torch.Tensor]


def _modules(shares: Sequence[Share], component: str, path: str) -> tuple[_Weighted, _Weighted]:
    """A layer's modules with their weights: those that stay whole, and those that may be truncated."""
    split: tuple[_Weighted, _Weighted] = ([], [])
    for share in shares:
        module = share.fitted[component].get(path)
        if module is not None:
            split[share.is_truncated].append((module, share.weight))
    return split


def _scaled(modules: _Weighted) -> Iterator[_Pair]:
    for module, weight in modules:
        yield module.down.float(), module.up.float() * (module.scale * weight)


def _write(factors: LoraFactors[torch.Tensor], pairs: Sequence[_Pair]) -> None:
    end = 0
    for down, up in pairs:
        start, end = end, end + len(down)
        if end > len(factors.down):
            raise ValueError(f"needs a rank of {end}, and there is one of {len(factors.down)}")
        factors.down[start:end], factors.up[:, start:end] = down, up


def _truncated(pairs: Sequence[_Pair], rank: int) -> tuple[_Pair, float, float]:
    """The sum of products as one of at most `rank`, the nearest there is (Eckart and Young 1936), and the squared
    Frobenius norms of what is left out and of all.

    The singular values of a product of thin matrices are those of their triangular factors' product, which is small.
    """
    down, up = torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs], dim=1)
    if len(down) <= rank:
        return (down, up), 0.0, float((down @ down.T * (up.T @ up)).sum())
    left, triangular = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(triangular @ other.T, full_matrices=False)
    root = s[:rank].sqrt()
    kept = root[:, None] * (v[:rank] @ right.T), (left @ u[:, :rank]) * root
    return kept, float(s[rank:].square().sum()), float(s.square().sum())
