"""Pictures that are made to take long: refused before they are decoded, and nothing else is."""

from __future__ import annotations

import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve.images import read_image
from unit.pictures import encoded, picture

PROGRESSIVE = encoded(picture(), "JPEG", progressive=True)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
SCANS = PROGRESSIVE.count(b"\xff\xda")


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2, "big") + data


def with_scans(count: int) -> bytes:
    return PROGRESSIVE[:-2] + LAST_SCAN * (count - SCANS) + PROGRESSIVE[-2:]


def test_as_many_scans_as_encoders_make_and_more_are_read() -> None:
    assert SCANS == 10
    expected = read_image("init_image", PROGRESSIVE).tobytes()
    assert read_image("init_image", with_scans(64)).size == (64, 64)
    hidden = b"\xff\xda\x00\x08" * 1000  # a thumbnail's, a profile's, or what follows the picture
    inside = PROGRESSIVE[:2] + segment(0xE1, hidden) + segment(0xFE, hidden) + PROGRESSIVE[2:] + hidden
    assert read_image("init_image", inside).tobytes() == expected


@pytest.mark.parametrize(
    "data",
    [
        with_scans(65),
        # As libjpeg does, which skips what has no length where a scan should go on.
        PROGRESSIVE[:-2] + b"\xff\x02\xff\xff" + LAST_SCAN * 55 + PROGRESSIVE[-2:],
        PROGRESSIVE[:2] + segment(0xFE, b"") * 4100 + PROGRESSIVE[2:],
    ],
)
def test_a_jpeg_that_takes_longer_than_its_size_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="init_image is a JPEG of more than 64 scans or 4096 segments"):
        read_image("init_image", data)
