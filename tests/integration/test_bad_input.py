"""Bad input at the real server: a clear error each time, and the server goes on serving."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from diffuserve.wire import INPUTS, WIRE_VERSION
from diffuserve_client import Client

DATATYPES = {spec.name: spec.datatype for spec in INPUTS}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BYTES": np.object_}


def ask_raw(server: Any, **tensors: Any) -> str:
    """Send tensors as they are, past the client library's own checks; the error's text, or "" for an answer."""
    answers: queue.Queue[Any] = queue.Queue()
    inputs = []
    for name, value in tensors.items():
        datatype = DATATYPES.get(name, "BYTES")
        array = np.array(value if isinstance(value, list) else [value], dtype=NUMPY[datatype])
        tensor = triton.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with triton.InferenceServerClient(server.grpc_url) as raw:
        raw.start_stream(lambda result, error: answers.put(error.message() if error else ""))
        raw.async_stream_infer("diffusion", inputs, model_version=str(WIRE_VERSION))
        return str(answers.get(timeout=60))


BAD: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("long prompt", {"prompt": b"a" * 10_000}, ("[invalid_argument]", "10000 bytes", "8192", "shorten")),
    ("not UTF-8", {"prompt": b"a \xff circle"}, ("[invalid_argument]", "UTF-8", "byte 2")),
    ("steps 0", {"steps": 0}, ("[invalid_argument]", "steps is 0", "from 1 to 150")),
    ("steps -1", {"steps": -1}, ("[invalid_argument]", "steps is -1", "from 1 to 150")),
    ("steps huge", {"steps": 2**31 - 1}, ("[invalid_argument]", "steps is 2147483647", "from 1 to 150")),
    ("width 0", {"width": 0}, ("[invalid_argument]", "width is 0", "multiple of 16 from 32 to 192")),
    ("width 63", {"width": 63}, ("[invalid_argument]", "width is 63", "multiple of 16 from 32 to 192")),
    ("width huge", {"width": 100_000}, ("[invalid_argument]", "width is 100000", "multiple of 16 from 32 to 192")),
    ("guidance NaN", {"guidance_scale": float("nan")}, ("[invalid_argument]", "guidance_scale is nan", "0 to 50")),
    ("guidance inf", {"guidance_scale": float("inf")}, ("[invalid_argument]", "guidance_scale is inf", "0 to 50")),
    ("seed -2", {"seed": -2}, ("[invalid_argument]", "seed is -2", "-1 lets the server draw one")),
    (
        "last seed, two images",
        {"seed": 2**63 - 1, "num_images": 2},
        ("[invalid_argument]", "image i uses seed + i", "use a smaller seed"),
    ),
    ("sampler", {"sampler": b"euler; import os"}, ("[invalid_argument]", "must be one of ddim")),
    ("checkpoint", {"checkpoint": b"../../etc"}, ("[not_found]", "deployed are shapes")),
    ("no images", {"num_images": 0}, ("[invalid_argument]", "num_images is 0", "from 1 to 16")),
    ("many images", {"num_images": 1000}, ("[invalid_argument]", "num_images is 1000", "from 1 to 16")),
    ("two prompts", {"prompt": [b"a circle", b"a ring"]}, ("prompt", "2")),
    ("no ControlNet", {"control_image": b"\x89PNG"}, ("[unsupported]", "shapes has no ControlNet", "leave it out")),
    ("a mask of nothing", {"mask_image": b"\x89PNG"}, ("[invalid_argument]", "mask_image is given without init_image")),
    ("unknown input", {"wdith": b"64"}, ("wdith",)),
    ("format", {"image_format": b"svg"}, ("[invalid_argument]", "must be one of png, jpeg, webp")),
]


@pytest.mark.parametrize(("tensors", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_values_are_refused_and_the_server_goes_on(
    server: Any, client: Client, tensors: dict[str, Any], said: tuple[str, ...]
) -> None:
    error = ask_raw(server, **{"prompt": b"a circle", "steps": 2, **tensors})
    assert error, "it was served"
    for words in said:
        assert words in error
    assert client.generate("a circle", steps=1).image.size == (64, 64)


def test_the_last_seed_is_a_seed(server: Any) -> None:
    assert ask_raw(server, prompt=b"a circle", steps=1, seed=2**63 - 1) == ""


def test_every_input_that_is_not_built_is_refused_by_name(server: Any) -> None:
    from diffuserve.request import GenerateRequest

    values = {"BYTES": b"x", "INT32": 1, "INT64": 1, "FP32": 0.5}
    for spec in INPUTS:
        if spec.name not in (*GenerateRequest.field_names(), "operation"):
            error = ask_raw(server, prompt=b"a circle", **{spec.name: values[spec.datatype]})
            assert f"[unsupported] {spec.name}" in error


def _generate_over_http(server: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/diffusion/generate", json.dumps(body).encode(), method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_generate_refuses_keys_that_it_does_not_know(server: Any) -> None:
    status, answer = _generate_over_http(server, {"prompt": "a circle", "steps": 1, "num_inference_steps": 30})
    assert status == 400
    assert "'num_inference_steps' is not an input" in answer["error"]
    assert _generate_over_http(server, {"prompt": "a circle", "steps": 1, "image_encoding": "base64"})[0] == 200


def test_generate_refuses_bad_values_with_the_same_words(server: Any) -> None:
    status, answer = _generate_over_http(server, {"prompt": "a circle", "steps": 0})
    assert status == 400
    assert "[invalid_argument] steps is 0, and must be from 1 to 150" in answer["error"]
