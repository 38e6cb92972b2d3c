"""Texts in PNG files. PNG specification (third edition), 5.3 "Chunk layout" and 11.3.3 "Textual information".

The pixels are never decoded: chunks are added, and found by their lengths.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Final

__all__ = ["MAX_TEXT_BYTES", "SIGNATURE", "inflated", "itxt_chunk", "png_texts", "text_chunk", "with_chunks"]

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
#: Of one text, unpacked. Pillow's limit too.
MAX_TEXT_BYTES: Final = 1 << 20
_MAX_CHUNKS: Final = 100_000
_HEADER_END: Final = len(SIGNATURE) + 25  # IHDR comes first, and always has 13 bytes


def text_chunk(keyword: str, text: str) -> bytes:
    """The text as tEXt where Latin-1 can hold it, else as iTXt: as Pillow, and so the web UIs, write it."""
    try:
        return _chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return itxt_chunk(keyword, text)


def itxt_chunk(keyword: str, text: str) -> bytes:
    """The text in UTF-8, not compressed, of no language."""
    return _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode())


def with_chunks(data: bytes, chunks: bytes) -> bytes:
    """The PNG with more chunks, before all but its header. Raises ValueError for what is no PNG."""
    if data[: len(SIGNATURE)] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < _HEADER_END:
        raise ValueError("it is no PNG")
    return data[:_HEADER_END] + chunks + data[_HEADER_END:]


def png_texts(data: bytes, keywords: Collection[str]) -> dict[str, str]:
    """The first text of each of the keywords. Raises ValueError for a file that is damaged, or beyond the limits."""
    found: dict[str, str] = {}
    for kind, content in _chunks(data):
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = _text(kind, content)
            if keyword in keywords:
                found.setdefault(keyword, text())
        if len(found) == len(keywords):
            break
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and contents up to the end; of text chunks only, others' contents are not looked at."""
    position = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if len(data) - position < 12:
            raise ValueError("it ends in the middle")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError("it ends in the middle")
        if kind == b"IEND":
            return
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            content = data[position + 8 : end - 4]
            if zlib.crc32(kind + content) != struct.unpack_from(">I", data, end - 4)[0]:
                raise ValueError("one of its texts is damaged")
            yield kind, content
        position = end
    raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")


def _text(kind: bytes, content: bytes) -> tuple[str, Callable[[], str]]:
    """The keyword, and what unpacks the text."""
    raw_keyword, _, rest = content.partition(b"\0")
    keyword = raw_keyword.decode("latin-1")
    if kind == b"tEXt":
        return keyword, lambda: _within_limit(rest).decode("latin-1")
    if kind == b"zTXt":
        return keyword, lambda: inflated(rest[1:]).decode("latin-1")
    is_compressed, packed = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return keyword, lambda: (inflated(packed) if is_compressed else _within_limit(packed)).decode()


def inflated(packed: bytes) -> bytes:
    """zlib's data unpacked. Raises ValueError for what is none, and for what is more than a text may be."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, MAX_TEXT_BYTES + 1)
    except zlib.error as error:
        raise ValueError("one of its texts is damaged") from error
    return _within_limit(content)


def _within_limit(content: bytes) -> bytes:
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"one of its texts has more than {MAX_TEXT_BYTES} bytes")
    return content
