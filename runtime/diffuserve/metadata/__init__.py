"""How a picture was made, in its file: PNG texts, or the Exif block of JPEG and WebP. The pixels stay as they are.

Nothing here decodes a picture, so that no file can make it do so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.metadata.containers import MOST_JPEG_BLOCK, jpeg_exif, webp_exif, with_jpeg_exif, with_webp_exif
from diffuserve.metadata.exif import ExifTexts, exif_block, exif_texts
from diffuserve.metadata.png import SIGNATURE, itxt_chunk, png_texts, text_chunk, with_chunks
from diffuserve.metadata.record import Record

__all__ = ["Record", "read_record", "with_record"]

_MAX_FILE_BYTES: Final = 128 << 20
_INFOTEXT_KEY: Final = "parameters"  # the web UIs'
_RECORD_KEY: Final = "diffuserve"


def with_record(data: bytes, image_format: str, record: Record) -> bytes:
    """The encoded picture with its record and the web UIs' text.

    Raises ValueError for what is not a whole picture in that format.
    """
    text, told = record.to_infotext(), record.to_json()
    if image_format == "png":
        return with_chunks(data, text_chunk(_INFOTEXT_KEY, text) + itxt_chunk(_RECORD_KEY, told))
    block = exif_block(text, told)
    if image_format == "webp":
        return with_webp_exif(data, block)
    if len(block) > MOST_JPEG_BLOCK:  # no prompt is so long, but a server's list of files may be
        block = exif_block(None, told)
    return with_jpeg_exif(data, block)


def read_record(path: str | os.PathLike[str]) -> Record:
    """What a file says of how its picture was made: our record, else a web UI's text.

    Raises InvalidArgumentError for a file that cannot be read, is no picture, is damaged, or says nothing.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refused(f"cannot read {path}: {error.strerror}; give a picture's file") from error
    if len(data) > _MAX_FILE_BYTES:
        raise _refused(f"{path} has more than {_MAX_FILE_BYTES} bytes; give a smaller picture")
    try:
        text, told = _texts(data)
        if told is not None:
            return Record.from_json(told)
        if text is not None:
            return Record.from_infotext(text)
    except ValueError as error:  # of UTF-8 as well
        raise _refused(f"{path} cannot be used: {error}; give the file as it was written") from error
    raise _refused(
        f"{path} does not say how it was made; give a picture that diffuserve or a web UI of Stable Diffusion saved"
    )


def _texts(data: bytes) -> ExifTexts:
    """A web UI's text, and our record."""
    if data.startswith(SIGNATURE):
        found = png_texts(data, (_INFOTEXT_KEY, _RECORD_KEY))
        return found.get(_INFOTEXT_KEY), found.get(_RECORD_KEY)
    if data.startswith(b"\xff\xd8"):
        block = jpeg_exif(data)
    elif data.startswith(b"RIFF"):
        block = webp_exif(data)
    else:
        raise ValueError("it is no PNG, JPEG or WebP")
    return (None, None) if block is None else exif_texts(block)


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, input="from_image")
