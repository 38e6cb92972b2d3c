"""Linear layers and convolutions that hold quantized weights, as torch modules that export to Q/DQ in ONNX.

In torch they compute what the graph computes, operator by operator, so that a quantized module is both what is
exported and what the graph is verified against. Scales are in the module's own precision; weights keep theirs,
whatever the module is cast to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FLOAT8",
    "INT4",
    "INT4_BLOCK",
    "INT8",
    "QUANTIZED_OPSET",
    "Number",
    "QuantizedConv2d",
    "QuantizedLinear",
    "pack_int4",
]

#: The first in which Q/DQ take every type that is used here, with scales in half precision.
QUANTIZED_OPSET: Final = 21
#: Weights that share a scale. TensorRT takes 64 and 128; every width of Stable Diffusion is a multiple of 64.
INT4_BLOCK: Final = 64


@dataclass(frozen=True, slots=True)
class Number:
    """A kind of number that a layer is quantized to. `limit` is the largest, to which the largest value is scaled."""

    name: str
    limit: float
    lowest: float
    dtype: torch.dtype


INT8: Final = Number("int8", 127, -128, torch.int8)
FLOAT8: Final = Number("fp8", 448, -448, torch.float8_e4m3fn)
#: Two in a byte in the graph, one in torch, which has no such type.
INT4: Final = Number("int4", 7, -8, torch.int8)


def rounded(value: Tensor, number: Number) -> Tensor:
    """`value`, in units of its scale, as numbers of that kind: to the nearest, ties to even, clipped."""
    clipped = value.clamp(number.lowest, number.limit)
    return (clipped if number.dtype.is_floating_point else clipped.round()).to(number.dtype)


def _quantize(value: Tensor, scale: Tensor, zero: Tensor, number: Number) -> Tensor:
    """`zero` says by its type what is quantized to."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "QuantizeLinear", (value, scale, zero), dtype=number.dtype, shape=value.shape, version=QUANTIZED_OPSET
        )
    return rounded(value / scale, number)


def _dequantize(value: Tensor, scale: Tensor, axis: int = 0, block: int = 0) -> Tensor:
    """`scale` is one number, or one for each index of `axis`, or one for each `block` indices of it."""
    if torch.onnx.is_in_onnx_export():
        attributes = {"axis": axis} if scale.ndim else {}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (value, scale),
            {**attributes, **({"block_size": block} if block else {})},
            dtype=scale.dtype,
            shape=value.shape,
            version=QUANTIZED_OPSET,
        )
    wide = value.to(scale.dtype)
    if block:
        return wide * scale.repeat_interleave(block, dim=axis)
    return wide * (scale.view(-1, *[1] * (value.ndim - axis - 1)) if scale.ndim else scale)


class _Quantized(nn.Module):
    """A layer whose weight is `weight` times `weight_scale`, and whose inputs are rounded by `input_scale`, if any.

    `smoothing` is multiplied to the inputs before, channel by channel: the weights hold its inverse.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    zero: Tensor
    smoothing: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        input_scale: Tensor | None = None,
        input_number: Number = INT8,
        smoothing: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.input_number = input_number
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("zero", torch.zeros((), dtype=input_number.dtype))
        self.register_buffer("smoothing", smoothing)

    def _inputs(self, value: Tensor) -> Tensor:
        if self.smoothing is not None:
            value = value * self.smoothing
        if self.input_scale is None:
            return value
        return _dequantize(_quantize(value, self.input_scale, self.zero, self.input_number), self.input_scale)


class QuantizedLinear(_Quantized):
    """`weight` is [in, out], as a MatMul takes it; `weight_scale` [out], a number, or [in / INT4_BLOCK, out]."""

    bias: Tensor | None

    def forward(self, value: Tensor) -> Tensor:
        blocks = self.weight_scale.ndim == 2
        weight = _dequantize(self.weight, self.weight_scale, 0 if blocks else 1, INT4_BLOCK if blocks else 0)
        output = self._inputs(value) @ weight
        return output if self.bias is None else output + self.bias


class QuantizedConv2d(_Quantized):
    """`weight` is [out, in, height, width], `weight_scale` [out] or a number."""

    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = {name: getattr(convolution, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, value: Tensor) -> Tensor:
        return F.conv2d(self._inputs(value), _dequantize(self.weight, self.weight_scale), self.bias, **self.geometry)


def pack_int4(model: onnx_ir.Model) -> None:
    """Store the weights that are dequantized in blocks as INT4, two in a byte."""
    for node in model.graph.all_nodes():
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is None or "block_size" not in node.attributes or weight.const_value is None:
            continue
        weight.dtype = onnx_ir.DataType.INT4
        weight.const_value = _packed(weight.const_value)


def _packed(tensor: Any) -> Any:
    """The lower half of each byte comes first. Made when it is written, so that one weight at a time is in memory."""

    def pack() -> onnx_ir.TensorProtocol:
        values = tensor.numpy().reshape(-1, 2)
        packed = (values[:, 0] & 0xF | (values[:, 1] & 0xF) << 4).astype(np.uint8)
        return onnx_ir.PackedTensor(packed, onnx_ir.DataType.INT4, shape=tensor.shape, name=tensor.name)

    return onnx_ir.LazyTensor(pack, dtype=onnx_ir.DataType.INT4, shape=tensor.shape, name=tensor.name)
