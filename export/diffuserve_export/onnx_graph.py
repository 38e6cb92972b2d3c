"""torch module -> ONNX file."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir
import torch
from torch import Tensor, nn

from diffuserve.manifest import TensorShape
from diffuserve_export.errors import ExportError
from diffuserve_export.ports import Ports
from diffuserve_export.quantize.layers import pack_int4

__all__ = ["onnx_from_component"]

# A protobuf holds 2 GB at most, and one of 1.3 GB took 8 GB of memory to write. Above this the weights go into a file
# beside the graph.
_LARGEST_IN_GRAPH: Final = 256_000_000


def onnx_from_component(module: nn.Module, ports: Ports, example: Sequence[Tensor], path: Path, opset: int) -> Path:
    """Write `module` to `path`, with the names, and the dimensions that vary, of `ports`.

    `example` are inputs of any size; every side that varies must be 2 at least, since the tracer takes 1 as fixed.
    Weights beyond what one protobuf can hold are in `<path>.data`. Raises ExportError where torch cannot do it.
    """
    inputs, outputs = ports
    shapes = [{axis: side for axis, side in enumerate(port.shape) if isinstance(side, str)} for port in inputs]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(example),
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in inputs],
                output_names=[port.name for port in outputs],
                dynamic_shapes=_nested(module, shapes),
                verbose=False,
            )
    except Exception as error:  # torch's exporter wraps whatever its tracer met
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch could not turn {type(module).__name__} into ONNX: {reason}") from error
    assert program is not None
    _tidy(program.model, inputs, outputs)
    pack_int4(program.model)
    size = sum(weight.numel() * weight.element_size() for weight in (*module.parameters(), *module.buffers()))
    program.save(str(path), external_data=size > _LARGEST_IN_GRAPH)
    for value in program.model.graph.initializers.values():
        value.const_value = None  # something in torch's exporter keeps the model, and it would keep the weights
    return path


def _nested(module: nn.Module, shapes: Sequence[Any]) -> tuple[Any, ...]:
    """As `module.forward` takes its inputs: those of `*further` are one tuple."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    return (*shapes[:named], tuple(shapes[named:])) if named < len(shapes) else tuple(shapes)


def _tidy(model: onnx_ir.Model, inputs: Sequence[TensorShape], outputs: Sequence[TensorShape]) -> None:
    """Name every side as `ports` do, and drop the tracer's notes: they hold file names of the machine it ran on."""
    for value, port in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        value.shape = onnx_ir.Shape(port.shape)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on optional packages: what matters is verified afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
