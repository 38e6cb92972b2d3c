"""Requests and events survive the wire, and the tensors are the documented ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuserve import request, wire
from diffuserve.errors import InternalError
from diffuserve.request import EVENT_KINDS, IMAGE_ENCODINGS, IMAGE_FORMATS, MAX_SEED, Event, GenerateRequest
from diffuserve.wire import (
    INPUTS,
    MODEL_NAME,
    OUTPUTS,
    WIRE_VERSION,
    decode_event,
    decode_request,
    encode_event,
    encode_request,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"))
# An empty name is not left out but sent: the server refuses it by name.
NAME = st.none() | TEXT.filter(lambda text: len(text.encode()) <= 256)

# A busy machine is slow now and then, which is no fault of what is tested.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

DTYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BYTES": np.object_}

# docs/architecture.md tells users of these; a name or a type that changes is a new wire version.
DOCUMENTED_INPUTS = """
    prompt BYTES, negative_prompt BYTES, prompt_syntax BYTES, checkpoint BYTES, width INT32, height INT32, steps INT32,
    guidance_scale FP32, guidance_rescale FP32, sampler BYTES, sigma_schedule BYTES, eta FP32, seed INT64,
    num_images INT32, init_image BYTES, mask_image BYTES, strength FP32, loras BYTES, control_image BYTES,
    control_scale FP32, clip_skip INT32, progress_every INT32, preview_every INT32, heartbeat_ms INT32,
    image_format BYTES, image_encoding BYTES, priority INT32, deadline_ms INT32, client_tag BYTES, operation BYTES,
    resume BYTES
"""
DOCUMENTED_OUTPUTS = "event BYTES, data BYTES, index INT32, step INT32, steps INT32, seed INT64, info BYTES"


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    num_images = draw(st.integers(1, 16))
    init_image = draw(st.binary())
    return GenerateRequest(
        prompt=draw(TEXT),
        negative_prompt=draw(TEXT),
        checkpoint=draw(NAME),
        width=draw(st.none() | INT32),
        height=draw(st.none() | INT32),
        steps=draw(st.none() | st.integers(1, 150)),
        guidance_scale=draw(st.none() | st.floats(0, 50, width=32)),
        sampler=draw(NAME),
        seed=draw(st.integers(-1, MAX_SEED - num_images + 1)),
        num_images=num_images,
        init_image=init_image,
        mask_image=draw(st.binary()) if init_image else b"",
        strength=draw(st.floats(0.001, 1)),
        control_image=draw(st.binary()),
        control_scale=draw(st.floats(0, 2)),
        loras=draw(st.sampled_from(((), ("style",), ("style:0.5", "other-1.5:-2:truncate")))),
        progress_every=draw(st.integers(0, 150)),
        image_format=draw(st.sampled_from(IMAGE_FORMATS)),
        image_encoding=draw(st.sampled_from(IMAGE_ENCODINGS)),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.builds(
    Event,
    kind=st.sampled_from(EVENT_KINDS),
    index=INT32,
    step=INT32,
    steps=INT32,
    seed=st.integers(-1, MAX_SEED),
    data=st.binary(),
    info=st.dictionaries(TEXT, JSON, max_size=4),
)


def documented(text: str) -> list[tuple[str, str]]:
    return [(name, datatype) for name, datatype in (entry.split() for entry in text.split(","))]


def test_the_tensors_are_the_documented_ones() -> None:
    assert [(spec.name, spec.datatype) for spec in INPUTS] == documented(DOCUMENTED_INPUTS)
    assert [(spec.name, spec.datatype) for spec in OUTPUTS] == documented(DOCUMENTED_OUTPUTS)
    assert [spec.name for spec in INPUTS if spec.required] == ["prompt"]
    assert {spec.name: spec.shape for spec in INPUTS if spec.shape != (1,)} == {"loras": (-1,)}
    assert {spec.shape for spec in OUTPUTS} == {(1,)}
    assert (MODEL_NAME, WIRE_VERSION) == ("diffusion", 1)


def test_every_field_of_a_request_has_its_input() -> None:
    assert set(GenerateRequest.field_names()) <= {spec.name for spec in INPUTS}


@pytest.mark.parametrize("module", [request, wire])
def test_all_names_what_is_there(module: Any) -> None:
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(module, name) for name in module.__all__)


@given(requests())
@patient
def test_a_request_survives_the_wire(original: GenerateRequest) -> None:
    tensors = encode_request(original)
    datatypes = {spec.name: spec.datatype for spec in INPUTS}
    for name, array in tensors.items():
        assert array.shape == (len(original.loras) if name == "loras" else 1,)
        assert array.dtype == DTYPES[datatypes[name]]
    came = decode_request(tensors)
    for field in GenerateRequest.field_names():
        sent, got = getattr(original, field), getattr(came, field)
        assert got == (pytest.approx(sent, rel=1e-7) if isinstance(sent, float) else sent)


@pytest.mark.parametrize("typed", [0.7, 0.3, 0.29, 1.0, 0.05])
def test_a_decimal_fraction_comes_as_it_was_typed(typed: float) -> None:
    came = decode_request(encode_request(GenerateRequest(prompt="a", strength=typed, guidance_rescale=typed)))
    assert (came.strength, came.guidance_rescale) == (typed, typed)


def test_what_is_not_asked_for_is_not_sent() -> None:
    assert set(encode_request(GenerateRequest(prompt="a"))) == {"prompt"}
    assert set(encode_request(GenerateRequest(prompt="", num_images=1, seed=0))) == {"prompt", "seed"}


@given(EVENTS)
@patient
def test_an_event_survives_the_wire(original: Event) -> None:
    tensors = encode_event(original)
    for spec in OUTPUTS:
        assert tensors[spec.name].shape == (1,)
        assert tensors[spec.name].dtype == DTYPES[spec.datatype]
    assert list(tensors) == [spec.name for spec in OUTPUTS], "every output in every response"
    assert decode_event(tensors) == original


def test_an_event_of_a_later_wire_is_refused_by_name() -> None:
    tensors = encode_event(Event(kind="image", info={}))
    tensors["event"] = np.array([b"hologram"], dtype=np.object_)
    with pytest.raises(InternalError, match="an event 'hologram' that this client does not know; update"):
        decode_event(tensors)


@pytest.mark.parametrize("name", [spec.name for spec in OUTPUTS])
def test_a_response_that_lacks_a_tensor_is_an_error(name: str) -> None:
    tensors = encode_event(Event(kind="image", info={}))
    for broken in ({key: tensors[key] for key in tensors if key != name}, {**tensors, name: tensors[name][:0]}):
        with pytest.raises(InternalError, match="the server's response cannot be read"):
            decode_event(broken)


@pytest.mark.parametrize(("name", "value"), [("info", b"{"), ("event", b"\xff"), ("step", b"many"), ("data", 1.5)])
def test_a_response_that_is_no_event_is_an_error(name: str, value: object) -> None:
    tensors = encode_event(Event(kind="image", info={}))
    with pytest.raises(InternalError, match="the server's response cannot be read"):
        decode_event({**tensors, name: np.array([value], dtype=np.object_)})
