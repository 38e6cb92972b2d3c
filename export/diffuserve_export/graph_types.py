"""Whether a graph's types are what TensorRT takes: strongly typed, so an Add of Half and Float is an error there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import defs, shape_inference

from diffuserve_export.errors import VerificationError

__all__ = ["check_types"]

# Shapes and axes are constants that inference needs; anything larger is a weight.
_LARGEST_CONSTANT: Final = 4096


def check_types(path: Path, component: str) -> None:
    """Raise VerificationError where a node's inputs differ in type although its operator wants them alike.

    Types follow from the graph's inputs and weights, not from what the exporter wrote down.
    """
    model = onnx.load(path, load_external_data=False)
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    types = _known_types(model, component)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        schema = defs.get_schema(node.op_type, versions[node.domain], node.domain)
        bound = _bound_types(node, schema, types, component)
        for position, name in enumerate(node.output):
            if name and name not in types:
                types[name] = _output_type(node, schema.outputs[min(position, len(schema.outputs) - 1)], bound)
    for name, kind in declared.items():
        if types.get(name) != kind:
            raise VerificationError(f"{component}: the output {name} is declared in another type than it has")


def _known_types(model: onnx.ModelProto, component: str) -> dict[str, int]:
    """The element types that onnx infers. It has no inference for some operators, and for nothing that follows them."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for weight in bare.graph.initializer:
        if len(weight.raw_data) > _LARGEST_CONSTANT:
            weight.ClearField("raw_data")
    for value in bare.graph.output:
        value.ClearField("type")
    try:
        inferred = shape_inference.infer_shapes(bare, strict_mode=False).graph
    except Exception as error:  # onnx raises several kinds, one of them for types that contradict each other
        reason = str(error).strip().splitlines()[0]
        raise VerificationError(f"{component}: the graph's types contradict each other: {reason}") from error
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    return {name: kind for name, kind in types.items() if kind}


def _bound_types(node: Any, schema: Any, types: Mapping[str, int], component: str) -> dict[str, int]:
    """The type that each of the operator's type variables stands for in this node."""
    bound: dict[str, tuple[str, int]] = {}
    for position, name in enumerate(node.input):
        if not name:
            continue
        kind = types.get(name, 0)
        variable = schema.inputs[min(position, len(schema.inputs) - 1)].type_str
        first, expected = bound.setdefault(variable, (name, kind))
        if kind == 0 or kind != expected:
            raise VerificationError(
                f"{component}: {node.op_type} {node.name} takes {first} in {_name(expected)} and {name} in "
                f"{_name(kind)}, and TensorRT wants one type"
            )
    return {variable: kind for variable, (_, kind) in bound.items()}


def _output_type(node: Any, formal: Any, bound: Mapping[str, int]) -> int:
    """0 where the operator alone does not tell."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype"):
            return int(attribute.i)
    if formal.type_str in bound:
        return bound[formal.type_str]
    fixed = [kind for kind in onnx.TensorProto.DataType.values() if formal.type_str == f"tensor({_name(kind).lower()})"]
    return int(fixed[0]) if fixed else 0


def _name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)) if kind else "an unknown type"
