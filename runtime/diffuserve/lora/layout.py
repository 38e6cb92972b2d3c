"""What the numbers of an adapter are: one vector of length P holds the factors of every layer that it changes.

LoRA (Hu et al., arXiv 2106.09685) adds to a layer's output W x the product of two thin matrices, up (down x), with down
[rank, in] and up [out, rank]. Here all of them lie end to end in one vector, at offsets that the export chose and its
graphs slice at. Nobody else computes an offset: exports and readers of files go through `LoraLayout.factors`.

A scale, such as alpha / rank of a file or the weight of a request, has no place of its own: it is multiplied into up.
Lower ranks fill the first rows of down and columns of up; the rest stays zero, and so do layers that a file leaves out.
Several LoRAs of one request stack theirs along the rank, which adds up what each of them does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

__all__ = ["CONV", "LINEAR", "LORA", "LORA_INDEX", "Layer", "LoraFactors", "LoraLayout", "LoraTarget", "layout_of"]

#: Names of the two inputs of an engine with LoRA.
LORA: Final = "lora"
LORA_INDEX: Final = "lora_index"

#: The kinds of layers: a linear one, and a convolution of 1x1, whose factors in files are [rank, in, 1, 1] and
#: [out, rank, 1, 1].
LINEAR: Final = "linear"
CONV: Final = "conv"


class _Vector(Protocol):
    """A numpy array or a torch tensor: slices and reshapes of it share its memory."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, key: slice, /) -> Any: ...


V = TypeVar("V", bound=_Vector)


@dataclass(frozen=True, slots=True)
class LoraFactors(Generic[V]):
    """Views of one layer's factors in an adapter's vector: `down` [rank, in] and `up` [out, rank]."""

    down: V
    up: V


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A layer that adapters can change, and where its factors begin in an adapter's vector.

    `path` is the module's in diffusers' naming (`down_blocks.0.attentions.0.proj_in`) or, of a text encoder, in that of
    transformers' CLIPTextModel as files of LoRA have it (`text_model.encoder.layers.0.self_attn.q_proj`). `kind` is
    LINEAR or CONV. `down` and `up` are offsets.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    down: int
    up: int


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """The layout of one component's adapters.

    `rank` is what every layer has room for. A call may bring at most `adapters`, the zeros of adapter 0 among them: its
    `lora` is [1 to adapters, P].
    """

    rank: int
    adapters: int
    targets: tuple[LoraTarget, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for factors that overlap or leave gaps, which no export writes."""
        if self.rank < 1 or self.adapters < 1 or not self.targets:
            raise ValueError(
                f"a layout of rank {self.rank} for {self.adapters} adapters and {len(self.targets)} layers has no room"
            )
        if len({one.path for one in self.targets}) != len(self.targets):
            raise ValueError("a layer is in the layout twice")
        places = [(one.down, self.rank * one.in_features) for one in self.targets]
        places += [(one.up, self.rank * one.out_features) for one in self.targets]
        end = 0
        for offset, length in sorted(places):
            if offset != end or length < 1:
                raise ValueError(f"the factors before {offset} end at {end}; export again")
            end = offset + length

    @property
    def size(self) -> int:
        """P, the numbers of one adapter."""
        return self.rank * sum(one.in_features + one.out_features for one in self.targets)

    def factors(self, vector: V) -> dict[str, LoraFactors[V]]:
        """Views of every layer's factors by its path: what is written to them is in `vector` [P].

        Raises ValueError where the vector has another length.
        """
        if tuple(vector.shape) != (self.size,):
            raise ValueError(f"an adapter is a vector of {self.size} numbers, not of shape {list(vector.shape)}")
        return {one.path: self._factors(vector, one) for one in self.targets}

    def _factors(self, vector: V, target: LoraTarget) -> LoraFactors[V]:
        down = vector[target.down : target.down + self.rank * target.in_features]
        up = vector[target.up : target.up + self.rank * target.out_features]
        return LoraFactors(down.reshape(self.rank, target.in_features), up.reshape(target.out_features, self.rank))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LoraLayout:
        """Raises KeyError, TypeError or ValueError where `raw` is not what `dataclasses.asdict` made of one."""
        return cls(raw["rank"], raw["adapters"], tuple(LoraTarget(**one) for one in raw["targets"]))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that is to be in a layout; see LoraTarget."""

    path: str
    kind: str
    in_features: int
    out_features: int


def layout_of(groups: Sequence[Sequence[Layer]], rank: int, adapters: int) -> LoraLayout:
    """Lay the layers' factors end to end. Of a group of layers, which read the same tensor, the downs come first."""
    targets, end = list[LoraTarget](), 0
    for group in groups:
        up = end + rank * sum(one.in_features for one in group)
        for one in group:
            targets.append(LoraTarget(one.path, one.kind, one.in_features, one.out_features, end, up))
            end, up = end + rank * one.in_features, up + rank * one.out_features
        end = up
    return LoraLayout(rank, adapters, tuple(targets))
