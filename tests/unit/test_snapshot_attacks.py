"""Snapshots as attackers send them: without the key, with another, and, for bugs of ours, with the right one."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuserve import snapshot as module
from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve.manifest import Conditioning
from diffuserve.request import GenerateRequest
from diffuserve.service import DiffusionService
from diffuserve.snapshot import ImageState, decode_snapshot, encode_snapshot
from unit.fakes import FakeModels, Recorder, write_deployment
from unit.pictures import encoded, picture
from unit.test_handing_over import drained_at
from unit.test_snapshot import snapshot

KEY = b"of this deployment......"
OTHERS = b"of another deployment..."
HEAD = module._HEAD.size
REFUSED = r"no snapshot|damaged|another key|format is \d+, and \d+ is read|at most \d+ are taken"


def small() -> Any:
    image = ImageState(0, 2, 1, 3, torch.ones(4, 2, 2), torch.zeros(0, 4, 2, 2))
    return replace(snapshot(), images=(image,))


DATA = encode_snapshot(small(), KEY)


def refused(data: bytes) -> str:
    with pytest.raises(InvalidArgumentError, match=REFUSED) as caught:
        decode_snapshot(data, KEY)
    assert caught.value.detail == {"input": "resume"}
    return caught.value.message


def with_checksum(data: bytes) -> bytes:
    """The same with a head whose checksum fits: whoever alters a snapshot can do that."""
    magic, version, _, signature = module._HEAD.unpack_from(data)
    head: bytes = module._HEAD.pack(magic, version, zlib.crc32(data[HEAD:]), signature)
    return head + data[HEAD:]


def test_every_bit_that_is_altered_is_seen() -> None:
    assert decode_snapshot(DATA, KEY).images
    for place in range(len(DATA)):
        for bit in range(8):
            altered = bytearray(DATA)
            altered[place] ^= 1 << bit
            refused(bytes(altered))


def test_every_byte_that_is_altered_is_seen_whatever_the_checksum() -> None:
    for place in range(HEAD, len(DATA)):
        altered = bytearray(DATA)
        altered[place] ^= 0xFF
        assert "another key" in refused(with_checksum(bytes(altered)))


def test_every_length_it_is_cut_to_is_seen() -> None:
    for length in range(len(DATA)):
        refused(DATA[:length])
        if length > HEAD:
            assert "another key" in refused(with_checksum(DATA[:length]))
    refused(DATA + b"\0")
    assert "another key" in refused(with_checksum(DATA + b"\0"))


def test_keys_of_others_and_no_key_sign_nothing() -> None:
    for key in (OTHERS, b"", KEY[:-1], KEY + b"\0.", KEY.upper()):
        assert "another key" in refused(encode_snapshot(small(), key))


def test_parts_of_two_snapshots_make_none() -> None:
    other = encode_snapshot(replace(small(), weights="def"), KEY)
    assert "another key" in refused(with_checksum(DATA[:HEAD] + other[HEAD:]))
    assert "damaged" in refused(DATA[:HEAD] + other[HEAD:])


@pytest.mark.parametrize("version", [0, module._VERSION + 1, 255])
def test_a_version_of_another_time_is_named(version: int) -> None:
    data = DATA[:4] + bytes([version]) + DATA[5:]
    assert refused(data) == (
        f"the snapshot's format is {version}, and {module._VERSION} is read; resume it on a server of its release"
    )


def test_what_is_too_large_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SNAPSHOT_BYTES", 99)
    monkeypatch.setattr(module, "_MAX_BASE64_BYTES", 132)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    for data in (DATA[:100], b"A" * 133):
        assert f"has {len(data)} bytes, and at most 99 are taken" in refused(data)
    monkeypatch.undo()
    limit = module.MAX_SNAPSHOT_BYTES
    assert len(base64.b64encode(bytes(limit))) == module._MAX_BASE64_BYTES


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_refused(data: bytes) -> None:
    refused(data)
    refused(DATA[:HEAD] + data)
    refused(base64.b64encode(DATA[: HEAD - 1] + data))


# From here on: signed with the right key, as a server of ours with a bug would. Nothing but its own request may suffer.


def resigned(data: bytes, change: Any) -> bytes:
    """The snapshot with other facts, signed as it should be."""
    tensors = safetensors.torch.load(data[HEAD:])
    facts = json.loads(zlib.decompress(tensors["facts"].numpy().tobytes()))
    change(facts, tensors)
    tensors["facts"] = module._packed(json.dumps(facts).encode())
    body: bytes = safetensors.torch.save(tensors)
    head: bytes = module._HEAD.pack(module._MAGIC, module._VERSION, zlib.crc32(body), module._signature(body, KEY))
    return head + body


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every leaf of some JSON, and to every object and list."""
    if path:
        yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in members:
        yield from places(one, (*path, key))


class Served:
    """A service that goes on, and a snapshot of a request that it could finish."""

    def __init__(self, folder: Path) -> None:
        deployment = write_deployment(folder, "fake", conditioning=Conditioning(control=True))
        drained, self.service = (DiffusionService(deployment, FakeModels().runner(), key=KEY) for _ in range(2))
        models: Any = drained._checkpoints["fake"]._runner
        fakes = models._models["unet"].__self__
        self.snapshot = (
            drained_at(drained, fakes, 4, sampler="heun", num_images=2, control_image=encoded(picture(32, 32)))
            .events[-1]
            .data
        )
        drained.close()
        packed = safetensors.torch.load(self.snapshot[HEAD:])["facts"].numpy().tobytes()
        self.facts = json.loads(zlib.decompress(packed))
        self.picture = self.ask().events[0].data

    def ask(self) -> Any:
        reply = Recorder()
        self.service.submit(GenerateRequest(prompt="b", seed=1, steps=1), reply)
        return reply.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("attacked") / "deployment")
    yield one
    one.service.close()


NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
NASTY = st.sampled_from([None, True, *NUMBERS, "", "x", "../../x", [], {}, [0], [[0, 0, 0, 0]], {"a": 1}])


TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from([(), (0,), (1,), (4, 8, 8), (1, 4, 8, 8), (9, 4, 8, 8), (4, 0, 8), (40, 8, 8)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]),
    st.sampled_from([0.0, 1.0, 1e30, float("nan")]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_signed_nonsense_is_refused_or_fails_alone(served: Served, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(places(served.facts))))
    value, remove, tensor = data.draw(NASTY), data.draw(st.booleans()), data.draw(st.booleans())

    def change(facts: Any, tensors: Any) -> None:
        if tensor:
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = data.draw(TENSORS)
            return
        for key in path[:-1]:
            facts = facts[key]
        if remove:
            del facts[path[-1]]
        else:
            facts[path[-1]] = value

    reply = Recorder()
    try:
        served.service.submit(GenerateRequest(prompt="", resume=resigned(served.snapshot, change)), reply)
    except DiffuserveError as error:
        reply.fail(error)
    assert reply.wait().finals == 1
    if reply.error is not None:
        assert reply.error.code in ("invalid_argument", "not_found", "queue_full", "component_failed"), reply.error
    assert served.ask().events[0].data == served.picture
