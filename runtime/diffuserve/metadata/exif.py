"""The Exif block of JPEG and WebP files: Exif 2.32, which is TIFF 6.0 with one directory inside another.

The web UIs write their text as `UserComment`, in UTF-16; `MakerNote` is where the standard has a maker's own data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Final

from diffuserve.metadata.png import inflated

__all__ = ["ExifTexts", "exif_block", "exif_texts"]

_EXIF_DIRECTORY: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_MAKER_NOTE: Final = 0x927C
_LONG: Final = 4
_UNDEFINED: Final = 7
_BYTES_OF_TYPE: Final = {1: 1, 2: 1, 3: 2, _LONG: 4, 5: 8, 6: 1, _UNDEFINED: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_UNICODE: Final = b"UNICODE\0"
_ASCII: Final = b"ASCII\0\0\0"
_MAKER: Final = b"diffuserve\0"

#: The comment, and our record; None where the block has none.
ExifTexts = tuple[str | None, str | None]


def exif_block(comment: str | None, record: str) -> bytes:
    """A block, big-endian as the web UIs write it, with the comment and our record."""
    values = {_MAKER_NOTE: _MAKER + zlib.compress(record.encode(), 9)}
    if comment is not None:
        values[_USER_COMMENT] = _UNICODE + comment.encode("utf-16-be")
    first = 8  # the first directory has one entry: where the second is
    second = first + 2 + 12 + 4
    outer = struct.pack(">HHHIII", 1, _EXIF_DIRECTORY, _LONG, 1, second, 0)
    position = second + 2 + 12 * len(values) + 4
    entries, contents = b"", b""
    for tag, value in sorted(values.items()):
        entries += struct.pack(">HHII", tag, _UNDEFINED, len(value), position + len(contents))
        contents += value + b"\0" * (len(value) % 2)
    return b"MM\0*" + struct.pack(">I", first) + outer + struct.pack(">H", len(values)) + entries + bytes(4) + contents


def exif_texts(block: bytes) -> ExifTexts:
    """What a block says. Raises ValueError for one that is damaged."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        raise ValueError("its Exif block is damaged")
    try:
        outer = _directory(block, order, struct.unpack_from(f"{order}I", block, 4)[0])
        if _EXIF_DIRECTORY not in outer:
            return None, None
        inner = _directory(block, order, struct.unpack(f"{order}I", outer[_EXIF_DIRECTORY])[0])
    except struct.error as error:
        raise ValueError("its Exif block is damaged") from error
    comment, note = inner.get(_USER_COMMENT), inner.get(_MAKER_NOTE, b"")
    return (
        None if comment is None else _comment(comment),
        inflated(note.removeprefix(_MAKER)).decode() if note.startswith(_MAKER) else None,
    )


def _directory(block: bytes, order: str, position: int) -> Mapping[int, bytes]:
    """A directory's values that we know, by their tags. Raises struct.error beyond the block.

    Of a tag that comes again the first counts: thousands of them may each have the whole block as their value.
    """
    (count,) = struct.unpack_from(f"{order}H", block, position)
    values = {}
    for entry in range(position + 2, position + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", block, entry)
        if tag not in (_EXIF_DIRECTORY, _USER_COMMENT, _MAKER_NOTE) or tag in values:
            continue
        size = length * _BYTES_OF_TYPE.get(kind, 1)
        # What fits in four bytes is in the entry itself.
        start = entry + 8 if size <= 4 else struct.unpack_from(f"{order}I", block, entry + 8)[0]
        if start + size > len(block):
            raise struct.error("beyond the block")
        values[tag] = block[start : start + size]
    return values


def _comment(value: bytes) -> str:
    if value.startswith(_ASCII):
        return value.removeprefix(_ASCII).decode("ascii", errors="replace")
    if not value.startswith(_UNICODE):
        return value.lstrip(b"\0").decode(errors="replace")
    text = value.removeprefix(_UNICODE)
    # The standard names no byte order. The web UIs write big-endian; of others the first letter, of Latin, tells.
    is_little = text[:2] == b"\xff\xfe" or (text[:1] != b"\0" and text[1:2] == b"\0")
    return text.decode("utf-16-le" if is_little else "utf-16-be", errors="replace").removeprefix("\ufeff")
