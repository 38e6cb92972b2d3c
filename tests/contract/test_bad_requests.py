"""What is refused before a checkpoint is known, on both sides of the wire, with the value, the limit and the remedy.

What only a checkpoint's manifest can refuse (sizes, names of samplers and checkpoints) passes here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import MAX_SEED, GenerateRequest
from diffuserve.wire import INPUTS, decode_request, encode_request

DTYPES: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


def texts(*values: bytes | str) -> Any:
    return np.array(values, dtype=np.object_)


def on_the_wire(values: dict[str, Any]) -> dict[str, Any]:
    """Tensors as any client may send them, past the checks of this project's own."""
    datatypes = {spec.name: spec.datatype for spec in INPUTS}
    return {
        name: texts(value) if datatypes[name] == "BYTES" else np.array([value], dtype=DTYPES[datatypes[name]])
        for name, value in values.items()
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a" * 10_000}, "prompt has 10000 bytes, and at most 8192 are taken; shorten it"),
    ({"prompt": "é" * 4097}, "prompt has 8194 bytes"),
    ({"negative_prompt": "a" * 10_000}, "negative_prompt has 10000 bytes"),
    ({"checkpoint": "a" * 257}, "checkpoint has 257 bytes, and at most 256"),
    ({"sampler": "a" * 257}, "sampler has 257 bytes"),
    ({"steps": 0}, "steps is 0, and must be from 1 to 150"),
    ({"steps": -1}, "steps is -1, "),
    ({"steps": 151}, "steps is 151, "),
    ({"steps": 2**31 - 1}, "steps is 2147483647, "),
    ({"guidance_scale": math.nan}, "guidance_scale is nan, and must be from 0 to 50"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf, "),
    ({"guidance_scale": -math.inf}, "guidance_scale is -inf, "),
    ({"guidance_scale": -0.5}, "guidance_scale is -0.5, "),
    ({"seed": -2}, "seed is -2, and must be from -1 to 9223372036854775807; -1 lets the server draw one"),
    ({"seed": MAX_SEED, "num_images": 2}, "which must not exceed 9223372036854775807; use a smaller seed"),
    ({"num_images": 0}, "num_images is 0, and must be from 1 to 16"),
    ({"num_images": 1000}, "num_images is 1000, "),
    ({"num_images": -1}, "num_images is -1, "),
    ({"progress_every": -1}, "progress_every is -1, and must be from 0 to 150; 0 is off"),
    ({"image_format": "gif"}, "image_format is 'gif', and must be one of png, jpeg, webp"),
    ({"image_format": "x" * 9999}, "image_format is '" + "x" * 64 + "', "),
    ({"image_encoding": "hex"}, "image_encoding is 'hex', and must be one of binary, base64"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_on_both_sides(values: dict[str, Any], message: str) -> None:
    values = {"prompt": "a", **values}
    with pytest.raises(InvalidArgumentError) as here:
        GenerateRequest(**values)
    with pytest.raises(InvalidArgumentError) as there:
        decode_request(on_the_wire(values))
    for caught in (here, there):
        assert message in caught.value.message
        assert caught.value.detail["input"] in values
        assert len(caught.value.to_wire()) < 1000, "a message does not repeat what was too long"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": ""},
        {"prompt": "a" * 8192},
        {"steps": 1},
        {"steps": 150},
        {"guidance_scale": 0.0},
        {"guidance_scale": 50.0},
        {"seed": MAX_SEED},
        {"seed": MAX_SEED - 15, "num_images": 16},
        {"seed": -1, "num_images": 16},
        {"width": 0},
        {"width": 63},
        {"width": 100_000},
        {"height": -1},
        {"sampler": "unknown"},
        {"checkpoint": "unknown"},
    ],
    ids=lambda values: str(values)[:40],
)
def test_the_limits_themselves_pass(values: dict[str, Any]) -> None:
    values = {"prompt": "a", **values}
    request = GenerateRequest(**values)
    assert decode_request(on_the_wire(values)) == request
    assert decode_request(encode_request(request)) == request


@pytest.mark.parametrize("name", ["steps", "num_images", "seed", "progress_every", "width", "height"])
@pytest.mark.parametrize("value", [2.5, 2.0, "2"])
def test_a_number_that_is_not_whole_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{name} is {value!r}, and must be a whole number"):
        GenerateRequest(prompt="a", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63])
def test_a_size_that_no_tensor_holds_is_refused(value: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"width is {value}, and must be from -2147483648 to 2147483647"):
        encode_request(GenerateRequest(prompt="a", width=value))


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "checkpoint", "sampler", "image_format"])
def test_invalid_utf_8_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{name} is not UTF-8 \(byte 1: .*\); encode it as UTF-8"):
        decode_request({"prompt": texts("a"), name: texts(b"a\xff")})


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "checkpoint", "sampler"])
def test_text_that_utf_8_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{name} cannot be UTF-8 \(character 1: surrogates"):
        GenerateRequest(**{"prompt": "a", name: "a\udcff"})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", [spec.name for spec in INPUTS if spec.shape == (1,)])
def test_one_value_is_taken(name: str, count: int) -> None:
    datatype = next(spec.datatype for spec in INPUTS if spec.name == name)
    many = texts(*[b"a"] * count) if datatype == "BYTES" else np.ones(count, dtype=DTYPES[datatype])
    with pytest.raises(InvalidArgumentError, match=f"{name} has {count} values, and one is taken"):
        decode_request({"prompt": texts("a"), name: many})


def test_the_prompt_is_needed() -> None:
    with pytest.raises(InvalidArgumentError, match="prompt is missing"):
        decode_request({})


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        (("../style",), "no such form: a name of letters, .* and no path; write name, name:0.8 or name:0.8:truncate"),
        (("/etc/passwd",), "no such form"),
        (("a/b",), "no such form"),
        (("..",), "no such form"),
        (("",), "no such form"),
        (("x" * 65,), "no such form"),
        (("a:1:2",), "no such form"),
        (("a:much",), "a weight that is no number"),
        (("a:nan",), "a weight that is not from -10 to 10"),
        (("a:-inf",), "a weight that is not from -10 to 10"),
        (("a:10.5",), "a weight that is not from -10 to 10"),
        (("a:1", "A:0.5"), "names a more than once; give it once, with the sum of the weights"),
        (tuple(f"a{number}" for number in range(9)), "loras has 9 values, and at most 8 are taken"),
        ("style", "must be a list of texts"),
    ],
)
def test_what_names_no_lora_is_refused(loras: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        GenerateRequest(prompt="a", loras=loras)
    assert caught.value.detail["input"] == "loras"


def test_a_flood_of_loras_is_not_read() -> None:
    with pytest.raises(InvalidArgumentError, match="loras has 10000 values"):
        decode_request({"prompt": texts("a"), "loras": texts(*[b"a"] * 10_000)})


def test_unknown_inputs_and_parameters_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'stepz' is not an input of this model") as caught:
        decode_request({"prompt": texts("a"), "stepz": np.array([3])})
    assert caught.value.detail == {"input": "stepz"}
    with pytest.raises(InvalidArgumentError, match="'stepz' is not an input of this model"):
        decode_request({"prompt": texts("a")}, {"stepz": 3})
    assert decode_request({"prompt": texts("a")}, {}) == GenerateRequest(prompt="a")
