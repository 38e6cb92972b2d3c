"""Files: read with a limit, written whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
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
    what = f"the folder {path.parent}"
    try:
        if path.is_dir():
            raise InvalidArgumentError(f"{path} is a folder; name a file in it", input="output")
        if _stream(path) is None:
            place, needed = _replaced(path).parent, os.W_OK | os.X_OK
            what = f"the folder {place}"
            if not place.is_dir():
                raise InvalidArgumentError(f"{what} does not exist; create it first", input="output")
        else:
            place, needed, what = path, os.W_OK, str(path)
        may_write = os.access(place, needed, effective_ids=os.access in os.supports_effective_ids)
    except OSError as error:  # such as a folder above it that may not be entered
        if error.errno == errno.ENAMETOOLONG:
            raise InvalidArgumentError(
                f"the name {path.name[:32]!r}... has {len(os.fsencode(path.name))} bytes, more than a file's may; "
                "choose a shorter one",
                input="output",
            ) from error
        may_write = False
    if not may_write:
        raise InvalidArgumentError(f"{what} cannot be written to; choose another", input="output")


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a file beside it, so that `path` never holds half a picture.

    A link stays one: the file that it names is written. What is no file, such as a pipe or /dev/stdout, cannot be
    replaced, and is written to.

    Raises OSError.
    """
    stream = _stream(path)
    if stream is not None:
        with open(stream, "wb", closefd=isinstance(stream, Path)) as file:
            file.write(data)
        return
    path = _replaced(path)
    # Not tempfile: its files are readable by their owner alone, whatever the umask says. And not after `path`, whose
    # name may be as long as names can be.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _replaced(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _stream(path: Path) -> Path | int | None:
    """What to open where the path is no file to replace: itself, or the descriptor of stdout or stderr.

    The latter even where they go to a file: opened anew, that would be written from its beginning.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None if stat.S_ISREG(found.st_mode) else path
