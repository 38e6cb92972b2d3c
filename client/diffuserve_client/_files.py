"""Files: read with a limit, written whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from diffuserve.errors import InvalidArgumentError

__all__ = ["FORMAT_OF_SUFFIX", "check_writable", "numbered", "read_limited", "write_atomically"]

FORMAT_OF_SUFFIX: Final = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def read_limited(path: Path, most: int, wanted: str) -> bytes:
    """A file's content, of `most` bytes at most. `wanted` says in an error what to give, such as `a picture's file`.

    Raises InvalidArgumentError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}; give {wanted}") from error
    if len(content) > most:
        raise InvalidArgumentError(f"{path} has more than {most} bytes; give {wanted} that is shorter")
    return content


def numbered(path: Path, count: int) -> list[Path]:
    """The files of `count` pictures: the path itself for one, else out-0.png, out-1.png, and so on."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def check_writable(path: Path) -> None:
    """Refuse what could only fail after the pictures were made.

    Raises InvalidArgumentError.
    """
    folder = path.parent
    try:
        if not folder.is_dir():
            raise InvalidArgumentError(f"the folder {folder} does not exist; create it first", input="output")
        if path.is_dir():
            raise InvalidArgumentError(f"{path} is a folder; name a file in it", input="output")
        may_write = os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    except OSError:  # such as a folder above it that may not be entered
        may_write = False
    if not may_write:
        raise InvalidArgumentError(f"the folder {folder} cannot be written to; choose another", input="output")


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a file beside it, so that `path` never holds half a picture.

    Raises OSError.
    """
    # Not tempfile: its files are readable by their owner alone, whatever the umask says.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
