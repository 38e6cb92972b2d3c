"""The files around Exif blocks: JPEG (ITU-T T.81, B.1) and WebP (RIFF, RFC 9649). The coded pixels stay as they are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

__all__ = ["MOST_JPEG_BLOCK", "jpeg_exif", "webp_exif", "with_jpeg_exif", "with_webp_exif"]

_EXIF: Final = b"Exif\0\0"
#: A segment's length has 16 bits, and counts itself.
MOST_JPEG_BLOCK: Final = 0xFFFF - 2 - len(_EXIF)
_SOI: Final = b"\xff\xd8"
_APP0, _APP1 = 0xE0, 0xE1
_START_OF_SCAN: Final = 0xDA
_HAS_EXIF, _HAS_ALPHA = 0x08, 0x10
_EXTENDED_BYTES: Final = 10
_MAX_PARTS: Final = 10_000


def with_jpeg_exif(data: bytes, block: bytes) -> bytes:
    """The JPEG with this Exif block, in place of any other. Raises ValueError for what is no JPEG."""
    kept, position = [], len(_SOI)
    for marker, start, end in _segments(data):
        position = end
        if not _is_exif(data, marker, start):
            kept.append((marker, data[start:end]))
    segment = struct.pack(">BBH", 0xFF, _APP1, 2 + len(_EXIF) + len(block)) + _EXIF + block
    first = kept[:1] if kept and kept[0][0] == _APP0 else []  # JFIF's own wants to be the first
    rest = kept[len(first) :]
    return b"".join([_SOI, *(one for _, one in first), segment, *(one for _, one in rest), data[position:]])


def jpeg_exif(data: bytes) -> bytes | None:
    """The JPEG's Exif block. Raises ValueError for a file that is damaged."""
    for marker, start, end in _segments(data):
        if _is_exif(data, marker, start):
            return data[start + 4 + len(_EXIF) : end]
    return None


def _is_exif(data: bytes, marker: int, start: int) -> bool:
    return marker == _APP1 and data.startswith(_EXIF, start + 4)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment before the pixels."""
    if not data.startswith(_SOI):
        raise ValueError("it is no JPEG")
    position = len(_SOI)
    for _ in range(_MAX_PARTS):
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if len(data) - position < 4 or data[position] != 0xFF:
            raise ValueError("it ends in the middle")
        marker, length = struct.unpack_from(">xBH", data, position)
        if marker == _START_OF_SCAN:
            return
        end = position + 2 + length
        if length < 2 or end > len(data) or 0xD0 <= marker <= 0xD9:
            raise ValueError("it is damaged")
        yield marker, position, end
        position = end
    raise ValueError(f"it has more than {_MAX_PARTS} segments")


def with_webp_exif(data: bytes, block: bytes) -> bytes:
    """The WebP with this Exif block, in place of any other. Raises ValueError for what is no WebP."""
    chunks = [(kind, content) for kind, content in _riff_chunks(data) if kind != b"EXIF"]
    if not chunks:
        raise ValueError("it is no WebP")
    if chunks[0][0] == b"VP8X" and len(chunks[0][1]) == _EXTENDED_BYTES:
        chunks[0] = (b"VP8X", bytes([chunks[0][1][0] | _HAS_EXIF]) + chunks[0][1][1:])
    else:
        chunks.insert(0, (b"VP8X", _extended_header(*chunks[0])))
    chunks.append((b"EXIF", block))
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_exif(data: bytes) -> bytes | None:
    """The WebP's Exif block. Raises ValueError for a file that is damaged."""
    return next((content for kind, content in _riff_chunks(data) if kind == b"EXIF"), None)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("it is no WebP")
    end = 8 + int.from_bytes(data[4:8], "little")
    position = 12
    for _ in range(_MAX_PARTS):
        if position >= end:
            return
        if len(data) - position < 8:
            raise ValueError("it ends in the middle")
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data):
            raise ValueError("it ends in the middle")
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise ValueError(f"it has more than {_MAX_PARTS} chunks")


def _extended_header(kind: bytes, frame: bytes) -> bytes:
    """VP8X's content for a file that had but one frame: flags, and its size."""
    if kind == b"VP8 " and frame[3:6] == b"\x9d\x01\x2a" and len(frame) >= 10:
        width, height = (int(side) & 0x3FFF for side in struct.unpack_from("<HH", frame, 6))
        flags = _HAS_EXIF
    elif kind == b"VP8L" and frame[:1] == b"\x2f" and len(frame) >= 5:
        bits = int.from_bytes(frame[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags = _HAS_EXIF | (_HAS_ALPHA if bits >> 28 & 1 else 0)
    else:
        raise ValueError("it is damaged")
    return bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
