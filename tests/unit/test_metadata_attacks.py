"""No file that is read for how its picture was made does harm."""

from __future__ import annotations

import json
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.errors import InvalidArgumentError
from diffuserve.metadata import png, read_record, with_record
from diffuserve.metadata.exif import exif_texts
from diffuserve.metadata.infotext import parameters_from_infotext
from diffuserve.request import GenerateRequest
from unit.metadata_cases import encoded, record, written

FORMATS = ("png", "jpeg", "webp")


@given(st.binary(max_size=300), st.sampled_from([png.SIGNATURE, b"\xff\xd8\xff\xe1", b"RIFF\xff\0\0\0WEBP", b""]))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, beginning: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(beginning + data)
    with pytest.raises(InvalidArgumentError):
        read_record(path)


@given(data=st.data(), image_format=st.sampled_from(FORMATS))
def test_a_flipped_bit_is_refused_or_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, image_format: str
) -> None:
    whole = bytearray(with_record(encoded(image_format), image_format, record(image_format)))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    with suppress(InvalidArgumentError):
        GenerateRequest.from_image(path)


def with_text(kind: bytes, content: bytes) -> bytes:
    return png.with_chunks(encoded("png"), png._chunk(kind, content))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no PNG, JPEG or WebP"),
        (b"GIF89a", "is no PNG, JPEG or WebP"),
        (encoded("png"), "does not say how it was made; give a picture that diffuserve or a web UI"),
        (encoded("jpeg"), "does not say how it was made"),
        (encoded("webp"), "does not say how it was made"),
        (encoded("png")[:60], "cannot be used: it ends in the middle"),
        (encoded("jpeg")[:10], "cannot be used: it is damaged"),
        (encoded("webp")[:30], "cannot be used: it ends in the middle"),
        (with_text(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(4 << 20))), "texts has more than 1048576 bytes"),
        (
            with_text(b"iTXt", b"diffuserve\0\1\0\0\0" + zlib.compress(bytes(4 << 20))),
            "texts has more than 1048576 bytes",
        ),
        (with_text(b"tEXt", b"parameters\0" + b"a" * (2 << 20)), "texts has more than 1048576 bytes"),
        (with_text(b"tEXt", b"parameters\0" + b"a" * (1 << 20)), "its text has more than 32768 characters"),
        (with_text(b"iTXt", b"diffuserve\0\0\0\0\0" + b"[" * 100_000), "its record is damaged"),
        (with_text(b"iTXt", b"diffuserve\0\0\0\0\0" + b"\xff"), "cannot be used: 'utf-8' codec"),
        (with_text(b"iTXt", b"diffuserve\0\0\0\0\0{}"), "its record is damaged"),
        (
            with_text(b"tEXt", b"parameters\0a\nSteps: many, Seed: 1, Size: 64x64"),
            "its text says Steps: 'many', which is no number",
        ),
        (b"\xff\xd8" + b"\xff\xe1\0\x04ab" * 20_000, "more than 10000 segments"),
        (b"RIFF\xff\xff\xff\0WEBP" + b"abcd\0\0\0\0" * 20_000, "more than 10000 chunks"),
        (png.SIGNATURE + png._chunk(b"abcd", b"") * 110_000, "more than 100000 chunks"),
    ],
)
def test_files_that_cannot_be_meant(data: bytes, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    with pytest.raises(InvalidArgumentError) as caught:
        GenerateRequest.from_image(path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": 3}, "its record says prompt: '3', which is no value for it"),
        ({"steps": True}, "says steps: 'True'"),
        ({"steps": "9"}, "says steps: '9'"),
        ({"loras": "night"}, "says loras: 'night'"),
        ({"loras": [3]}, "says loras: '[3]'"),
        ({"init_image": "x"}, "says init_image"),
        ({"magic": 1}, "made by diffuserve 0.1.0, with 'magic', which 0.1.0 does not have"),
        ({"steps": 500}, "steps is 500, and must be from 1 to 150"),
        ({"seed": 10**400}, "and must be from -1 to 9223372036854775807"),
        ({"loras": ["../night"]}, "loras holds '../night'"),
    ],
)
def test_records_that_no_client_wrote(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = json.loads(record().to_json())
    content["parameters"] |= change
    path = written(tmp_path, with_text(b"iTXt", b"diffuserve\0\0\0\0\0" + json.dumps(content).encode()))
    with pytest.raises(InvalidArgumentError) as caught:
        GenerateRequest.from_image(path)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "pictures", [[[1, 2]], [[1, 2], ["x", 3]], [["init_image", "0"]], "ab", 3, {"init_image": 3}, {"init_image": None}]
)
def test_digests_that_no_client_wrote(pictures: object, tmp_path: Path) -> None:
    content = json.loads(record().to_json()) | {"pictures": pictures}
    path = written(tmp_path, with_text(b"iTXt", b"diffuserve\0\0\0\0\0" + json.dumps(content).encode()))
    with pytest.raises(InvalidArgumentError, match="its record is damaged"):
        GenerateRequest.from_image(path)


def test_a_comment_that_comes_again_and_again_is_read_once() -> None:
    first, count, padding = b"ASCII\0\0\0red", 2000, bytes(4 << 20)
    begin = 28 + 12 * count
    block = b"MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x8769, 4, 1, 26, 0) + struct.pack(">H", count)
    block += struct.pack(">HHII", 0x9286, 7, len(first), begin)
    block += struct.pack(">HHII", 0x9286, 7, len(padding), begin) * (count - 1)
    started = time.process_time()
    assert exif_texts(block + first + padding) == ("red", None)
    assert time.process_time() - started < 0.3


def test_a_long_line_takes_no_long_time() -> None:
    for line in ("a" * 8000, 'ab:"\\",' * 1100, "a:" * 4000, '"' * 8000, "a " * 4000):
        started = time.monotonic()
        parameters_from_infotext(line + "\n" + line)
        assert time.monotonic() - started < 5, line[:10]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none\.png: No such file or directory; give"):
        GenerateRequest.from_image(tmp_path / "none.png")
    with pytest.raises(InvalidArgumentError, match="Is a directory"):
        GenerateRequest.from_image(tmp_path)


def test_a_record_without_a_prompt(tmp_path: Path) -> None:
    content = json.loads(record().to_json())
    del content["parameters"]["prompt"]
    path = written(tmp_path, with_text(b"iTXt", b"diffuserve\0\0\0\0\0" + json.dumps(content).encode()))
    with pytest.raises(InvalidArgumentError, match="its record has no prompt"):
        GenerateRequest.from_image(path)
