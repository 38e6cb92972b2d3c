"""Requests and events as Triton tensors, both ways: the only place that names tensors.

Arrays are what Triton's Python backend and tritonclient hold: BYTES as object arrays of bytes, numbers as
int32, int64 or float32, all of shape [1] unless the table says -1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from diffuserve.errors import InternalError, InvalidArgumentError
from diffuserve.request import EVENT_KINDS, Event, GenerateRequest

__all__ = [
    "INPUTS",
    "MODEL_NAME",
    "OPERATIONS",
    "OUTPUTS",
    "WIRE_VERSION",
    "Array",
    "Operation",
    "TensorSpec",
    "decode_event",
    "decode_operation",
    "decode_request",
    "encode_event",
    "encode_operation",
    "encode_request",
]

Array = npt.NDArray[Any]

MODEL_NAME: Final = "diffusion"
WIRE_VERSION: Final = 1  # the Triton version of the model; a change that old clients cannot read raises it


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the public model: Triton's data type, and -1 in `shape` where the length is free."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)
    required: bool = False


INPUTS: Final = (
    TensorSpec("prompt", "BYTES", required=True),
    TensorSpec("negative_prompt", "BYTES"),
    TensorSpec("prompt_syntax", "BYTES"),
    TensorSpec("checkpoint", "BYTES"),
    TensorSpec("width", "INT32"),
    TensorSpec("height", "INT32"),
    TensorSpec("steps", "INT32"),
    TensorSpec("guidance_scale", "FP32"),
    TensorSpec("guidance_rescale", "FP32"),
    TensorSpec("sampler", "BYTES"),
    TensorSpec("sigma_schedule", "BYTES"),
    TensorSpec("eta", "FP32"),
    TensorSpec("seed", "INT64"),
    TensorSpec("num_images", "INT32"),
    TensorSpec("init_image", "BYTES"),
    TensorSpec("mask_image", "BYTES"),
    TensorSpec("strength", "FP32"),
    TensorSpec("loras", "BYTES", (-1,)),
    TensorSpec("control_image", "BYTES"),
    TensorSpec("control_scale", "FP32"),
    TensorSpec("clip_skip", "INT32"),
    TensorSpec("progress_every", "INT32"),
    TensorSpec("preview_every", "INT32"),
    TensorSpec("heartbeat_ms", "INT32"),
    TensorSpec("image_format", "BYTES"),
    TensorSpec("image_encoding", "BYTES"),
    TensorSpec("priority", "INT32"),
    TensorSpec("deadline_ms", "INT32"),
    TensorSpec("client_tag", "BYTES"),
    TensorSpec("operation", "BYTES"),
    TensorSpec("resume", "BYTES"),
)
OUTPUTS: Final = (
    TensorSpec("event", "BYTES"),
    TensorSpec("data", "BYTES"),
    TensorSpec("index", "INT32"),
    TensorSpec("step", "INT32"),
    TensorSpec("steps", "INT32"),
    TensorSpec("seed", "INT64"),
    TensorSpec("info", "BYTES"),
)

#: The shape of inputs with any number of values.
_LIST: Final = (-1,)
_MOST_TEXTS: Final = 64  # of such a one; what is right is for GenerateRequest to say
#: BYTES that are no text.
_BINARY: Final = frozenset({"init_image", "mask_image", "control_image", "resume"})
_INPUT_SPECS: Final = {spec.name: spec for spec in INPUTS}
GENERATE: Final = "generate"
OPERATIONS: Final = ("status", "drain")
_MAX_GRACE_MS: Final = 3600 * 1000
_DTYPES: Final[dict[str, Any]] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BYTES": np.object_}


def _array(spec: TensorSpec, value: Any) -> Array:
    if spec.datatype == "BYTES":
        values = value if spec.shape == _LIST else [value]
        return np.array([one.encode() if isinstance(one, str) else one for one in values], dtype=np.object_)
    if spec.datatype != "FP32":
        limits = np.iinfo(_DTYPES[spec.datatype])
        if not limits.min <= value <= limits.max:
            raise InvalidArgumentError(
                f"{spec.name} is {value}, and must be from {limits.min} to {limits.max}", input=spec.name, value=value
            )
    return np.array([value], dtype=_DTYPES[spec.datatype])


def encode_request(request: GenerateRequest) -> dict[str, Array]:
    """The tensors of a request. Fields at their default are left out, so that the server's own defaults hold."""
    tensors = {}
    for field in fields(request):
        value = getattr(request, field.name)
        if field.default is MISSING or value != field.default:
            tensors[field.name] = _array(_INPUT_SPECS[field.name], value)
    return tensors


def encode_operation(name: str) -> dict[str, Array]:
    """The tensor that asks for an operation instead of pictures; `prompt` is empty beside it."""
    return {"operation": _array(_INPUT_SPECS["operation"], name)}


def decode_request(tensors: Mapping[str, Array], parameters: Mapping[str, Any] | None = None) -> GenerateRequest:
    """Read a request from its tensors.

    `parameters` are Triton's request parameters, where `/generate` puts every key that names no input:
    they are refused, since a misspelt option must not be ignored.

    Raises InvalidArgumentError.
    """
    for name in parameters or ():
        raise InvalidArgumentError(f"{name!r} is not an input of this model; leave it out or correct it", input=name)
    values: dict[str, Any] = {}
    for name, array in tensors.items():
        spec = _INPUT_SPECS.get(name)
        if spec is None:
            raise InvalidArgumentError(
                f"{name!r} is not an input of this model; leave it out or correct it", input=name
            )
        values[name] = _texts(spec, array) if spec.shape == _LIST else _scalar(spec, array)
    values.pop("operation", None)  # `generate`: decode_operation knows the others
    if "prompt" not in values:
        raise InvalidArgumentError("prompt is missing; the empty prompt is given as an empty string", input="prompt")
    return GenerateRequest(**values)


@dataclass(frozen=True, slots=True)
class Operation:
    """A request that asks for no picture: `status`, or `drain` with the token of who may ask and the grace time."""

    name: str
    token: str = ""
    grace_s: float = 0.0


def decode_operation(tensors: Mapping[str, Array], parameters: Mapping[str, Any] | None = None) -> Operation | None:
    """What a request asks for instead of pictures, or None where it asks for them.

    `drain` has its token and grace time in the request's parameters `token` and `grace_ms`, which /generate takes
    beside the inputs. Raises InvalidArgumentError.
    """
    array = tensors.get("operation")
    name = GENERATE if array is None else _scalar(_INPUT_SPECS["operation"], array)
    if name == GENERATE:
        return None
    if name not in OPERATIONS:
        raise InvalidArgumentError(
            f"operation is {name[:64]!r}, and must be one of {', '.join((GENERATE, *OPERATIONS))}", input="operation"
        )
    given = dict(parameters or {})
    token, grace = given.pop("token", ""), given.pop("grace_ms", 0)
    others = [*given, *(other for other in tensors if other not in ("operation", "prompt"))]
    if others:
        raise InvalidArgumentError(f"{others[0]!r} is no part of the operation {name}; leave it out", input=others[0])
    if not isinstance(token, str) or not isinstance(grace, int) or not 0 <= grace <= _MAX_GRACE_MS:
        raise InvalidArgumentError(
            f"token must be text and grace_ms a whole number from 0 to {_MAX_GRACE_MS}", input="grace_ms"
        )
    return Operation(name, token, grace / 1000)


def _texts(spec: TensorSpec, array: Array) -> tuple[str, ...]:
    if array.size > _MOST_TEXTS:
        raise InvalidArgumentError(
            f"{spec.name} has {array.size} values, and fewer than {_MOST_TEXTS} are read; leave some out",
            input=spec.name,
            value=int(array.size),
        )
    return tuple(_scalar(spec, one) for one in np.atleast_1d(array).reshape(-1, 1))


def _scalar(spec: TensorSpec, array: Array) -> Any:
    if array.size != 1:
        raise InvalidArgumentError(
            f"{spec.name} has {array.size} values, and one is taken; send one request per value",
            input=spec.name,
            value=int(array.size),
            maximum=1,
        )
    value = array.reshape(-1)[0]
    if spec.datatype == "FP32":
        return float(str(value))  # the number that was meant: 10 * 0.7 is 7, and 10 * 0.699999988 is less
    if spec.datatype != "BYTES":
        return value.item()
    if spec.name in _BINARY:
        return value.encode() if isinstance(value, str) else bytes(value)
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{spec.name} is not UTF-8 (byte {error.start}: {error.reason}); encode it as UTF-8", input=spec.name
        ) from error


def encode_event(event: Event) -> dict[str, Array]:
    """The tensors of one response; every output is in every response."""
    values = {
        "event": event.kind,
        "data": event.data,
        "index": event.index,
        "step": event.step,
        "steps": event.steps,
        "seed": event.seed,
        "info": event.info_json(),
    }
    return {spec.name: _array(spec, values[spec.name]) for spec in OUTPUTS}


def decode_event(tensors: Mapping[str, Array]) -> Event:
    """Read one response. Raises InternalError where it is not one that this version of the wire knows."""
    try:
        raw = {spec.name: tensors[spec.name].reshape(-1)[0] for spec in OUTPUTS}
        kind = bytes(raw["event"]).decode()
        if kind not in EVENT_KINDS:
            raise InternalError(f"the server sent an event {kind!r} that this client does not know; update the client")
        return Event(
            kind=kind,
            data=bytes(raw["data"]),
            index=int(raw["index"]),
            step=int(raw["step"]),
            steps=int(raw["steps"]),
            seed=int(raw["seed"]),
            info=json.loads(bytes(raw["info"])),
        )
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InternalError(f"the server's response cannot be read: {error!r}") from error
