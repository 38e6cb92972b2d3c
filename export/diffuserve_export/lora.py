"""Layers that adapters can change, in torch: the base layer, and beside it the adapter of each row.

With x [rows, tokens, in], down [rows, rank, in] and up [rows, out, rank] of the adapters that the rows chose, a layer
gives base(x) + (x down^T) up^T. What is added never becomes a matrix of [out, in], and no weight is written to.

Layers that read the same tensor, such as queries, keys and values of self-attention, have their down factors side by
side in the vector: one product makes the thin results of all of them, and reads the tensor once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from diffuserve.lora.layout import CONV, LINEAR, Layer, LoraLayout, LoraTarget, layout_of

__all__ = ["Adapters", "add_lora", "lora_layout", "most_adapters"]

#: A call's `lora` is one tensor that travels with every step.
MOST_BYTES: Final = 512_000_000
#: In files of LoRA, of CLIP's text encoders.
_TEXT_MODEL: Final = "text_model."


def most_adapters(rows: int, adapter_bytes: int) -> int:
    """How many adapters a call may bring: one for each row and that of zeros, within MOST_BYTES, and two at least."""
    return max(2, min(rows + 1, MOST_BYTES // adapter_bytes))


def lora_layout(module: nn.Module, rank: int, rows: int, number_bytes: int) -> LoraLayout:
    """Which layers of `module`, a component of `modules`, adapters can change, and the layout of their factors.

    They are what LoRA trainers choose: all linear layers and 1x1 convolutions of a UNet's transformers, and of a text
    encoder's layers. `rows` are the most of one call, `number_bytes` of one number of an adapter.
    """
    groups = _groups(module)
    adapter = layout_of(groups, rank, 1).size * number_bytes
    return layout_of(groups, rank, most_adapters(rows, adapter))


def add_lora(module: nn.Module, layout: LoraLayout) -> None:
    """Wrap the layers of `layout` in place: `module` takes `lora` and `lora_index` after its other inputs.

    The layers may have become quantized ones since `lora_layout` saw them.
    """
    adapters = Adapters()
    model: Any = module.model
    names = {_canonical(name): name for name, _ in model.named_modules()}
    members = dict[str, list[LoraTarget]]()
    for target in layout.targets:
        members.setdefault(_group(model, names[target.path]), []).append(target)
    for targets in members.values():
        thin = _Thin(adapters, targets, layout.rank)
        for position, target in enumerate(targets):
            parent, _, key = names[target.path].rpartition(".")
            base = model.get_submodule(names[target.path])
            setattr(model.get_submodule(parent), key, _LoraLayer(base, thin, position))
    module.adapters = adapters  # type: ignore[assignment]


def _groups(module: nn.Module) -> list[list[Layer]]:
    """The layers, gathered by what they read."""
    model: Any = module.model
    groups = dict[str, list[Layer]]()
    for name, layer in _layers(model):
        if isinstance(layer, nn.Linear):
            found = Layer(_canonical(name), LINEAR, layer.in_features, layer.out_features)
        else:
            found = Layer(_canonical(name), CONV, layer.in_channels, layer.out_channels)
        groups.setdefault(_group(model, name), []).append(found)
    return list(groups.values())


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for outer, block in model.named_modules():
        if isinstance(block, (Transformer2DModel, CLIPEncoderLayer)):
            for inner, layer in block.named_modules():
                if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
                    yield f"{outer}.{inner}", layer


def _canonical(name: str) -> str:
    """transformers' own name of a text encoder's layer may or may not have the first part that files have."""
    return _TEXT_MODEL + name if name.startswith("encoder.layers.") else name


def _group(model: nn.Module, name: str) -> str:
    """What a layer reads, as a name: projections of one attention share it, but for queries beside another's keys."""
    parent, _, key = name.rpartition(".")
    attention = model.get_submodule(parent)
    if isinstance(attention, Attention) and key in ("to_q", "to_k", "to_v"):
        return f"{parent}.queries" if key == "to_q" and attention.is_cross_attention else f"{parent}.context"
    if isinstance(attention, CLIPAttention) and key in ("q_proj", "k_proj", "v_proj"):
        return f"{parent}.context"
    return name


class Adapters:
    """What a call brought: `lora` [adapters, P] and `lora_index` INT64 [rows]. No module, so that nobody takes its
    tensors for weights.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()

    def take(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Keep the last two, for the layers; the others are returned."""
        *others, lora, index = inputs
        self._inputs = (lora, index)
        return others

    def rows(self, offset: int, *shape: int) -> Tensor:
        """Each row's part of its adapter: [rows, *shape]. Sliced first, so that no row gets a copy of all."""
        lora, index = self._inputs
        length = shape[0] * shape[1]
        return lora[:, offset : offset + length].index_select(0, index).unflatten(1, shape)


class _Thin:
    """The products with the down factors of layers that read the same tensor."""

    def __init__(self, adapters: Adapters, targets: Sequence[LoraTarget], rank: int) -> None:
        self.adapters, self.targets, self.rank = adapters, targets, rank
        self._read: Tensor | None = None
        self._waiting = dict[int, Tensor]()

    def of(self, position: int, value: Tensor) -> Tensor:
        """Of one layer, from what it reads: [rows, tokens, in] -> [rows, tokens, rank], or of a convolution
        [rows, in, positions] -> [rows, rank, positions].
        """
        if self._read is not value or position not in self._waiting:
            self._read, self._waiting = value, dict(enumerate(self._products(value)))
        thin = self._waiting.pop(position)
        if not self._waiting:
            self._read = None
        return thin

    def _products(self, value: Tensor) -> Sequence[Tensor]:
        first = self.targets[0]
        down = self.adapters.rows(first.down, len(self.targets) * self.rank, first.in_features).to(value.dtype)
        if first.kind == CONV:
            return (down @ value,)
        products = value @ down.transpose(1, 2)
        return products.split(self.rank, dim=-1) if len(self.targets) > 1 else (products,)


class _LoraLayer(nn.Module):
    """A linear layer or a 1x1 convolution, and the adapters of its rows."""

    def __init__(self, base: nn.Module, thin: _Thin, position: int) -> None:
        super().__init__()
        self.base, self.thin, self.position = base, thin, position
        self.target = thin.targets[position]

    def forward(self, value: Tensor) -> Tensor:
        target, rank = self.target, self.thin.rank
        up = self.thin.adapters.rows(target.up, target.out_features, rank).to(value.dtype)
        output: Tensor = self.base(value)
        if target.kind == CONV:
            change = up @ self.thin.of(self.position, value.flatten(2))
            return output + change.unflatten(2, value.shape[2:])
        return output + self.thin.of(self.position, value) @ up.transpose(1, 2)
