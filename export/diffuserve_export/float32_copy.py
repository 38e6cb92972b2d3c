"""A graph in float32 that computes what another in bf16 does, for where nothing runs bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

__all__ = ["float32_copy"]

_BF16 = onnx_ir.DataType.BFLOAT16
_FP32 = onnx_ir.DataType.FLOAT


def float32_copy(path: Path, to: Path) -> Path:
    """Write the graph at `path` to `to`, every bf16 in it float32 with the same value. Weights lie beside it."""
    model = onnx_ir.load(path)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _widen(value)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            _widen(value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.INT and name in ("to", "dtype") and attribute.value == _BF16:
                node.attributes[name] = onnx_ir.AttrInt64(name, int(_FP32))
            elif attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
                node.attributes[name] = onnx_ir.AttrTensor(name, _wide(attribute.value))
    onnx_ir.save(model, to, external_data=f"{to.name}.data")
    return to


def _widen(value: Any) -> None:
    if value.dtype == _BF16:
        value.dtype = _FP32
    if value.const_value is not None and value.const_value.dtype == _BF16:
        value.const_value = _wide(value.const_value)


def _wide(tensor: Any) -> Any:
    """Converted when it is written, so that one weight at a time is in memory."""
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(tensor.numpy().astype(np.float32)), dtype=_FP32, shape=tensor.shape, name=tensor.name
    )
