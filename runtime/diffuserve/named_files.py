"""Folders of safetensors files that requests name: textual inversions and LoRAs.

<folder>/<name>.safetensors               for every checkpoint
<folder>/<checkpoint>/<name>.safetensors  for one, before the others

Files are found when a request names them, while the server runs. Names come from clients and files from anywhere: a
name is looked up in the folder's list and never made into a path, and a file is read within a limit of its size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

__all__ = ["MAX_NAME", "NAME", "NamedFiles", "Seen", "seen"]

MAX_NAME: Final = 64
NAME: Final = re.compile(rf"\w(?:[\w.-]{{0,{MAX_NAME - 2}}}\w)?", re.ASCII)

_SUFFIX: Final = ".safetensors"
_PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
_SETTLED_S: Final = 2.0

_log: Final = logging.getLogger(__name__)

#: What tells one state of a file from another: inode, size, and the times of its contents and of itself.
Seen = tuple[int, int, int, int]


class NamedFiles:
    """The files below `root`, which need not exist, of at most `max_bytes`. Not safe to call from several threads."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._lists: dict[Path, tuple[int, dict[str, list[Path]]]] = {}

    def of(self, checkpoint: str) -> Mapping[str, list[Path]]:
        """The files of each name in lower case, a checkpoint's own before those for all."""
        return {**self._listed(self._root), **self._listed(self._root / checkpoint)}

    def _listed(self, folder: Path) -> dict[str, list[Path]]:
        try:
            changed = folder.stat().st_mtime_ns
        except OSError:
            return {}
        known = self._lists.get(folder)
        if known is not None and known[0] == changed:
            return known[1]
        files = dict[str, list[Path]]()
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                name = Path(entry.name)
                stem, suffix = name.stem, name.suffix
                if suffix not in (_SUFFIX, *_PICKLED):
                    continue
                if not NAME.fullmatch(stem):
                    _log.warning("a file has a name that no request can have: %r", entry.name[:256])
                    continue
                files.setdefault(stem.lower(), []).append(folder / entry.name)
        # A folder's time is coarse: one that has just changed may change again within it.
        if time.time_ns() - changed > _SETTLED_S * 1e9:
            self._lists[folder] = changed, files
        return files

    @staticmethod
    def chosen(paths: Sequence[Path]) -> Path:
        """The one file of a name that can be read. Raises ValueError with what is wrong with them."""
        usable = [path for path in paths if path.suffix == _SUFFIX]
        if not usable:
            raise ValueError("is pickled, which can run code when it is read; convert it to safetensors")
        if len(usable) > 1:
            names = " and ".join(sorted(path.name for path in usable))
            raise ValueError(f"is one of {names}, which have one name in requests; rename one")
        return usable[0]

    def content(self, path: Path) -> tuple[Seen, bytes]:
        """A file's bytes, and what it was then. Raises OSError, or ValueError with what is wrong with the file."""
        with self._opened(path) as (file, found):
            content = file.read(self._max_bytes)
            if seen(os.fstat(file.fileno())) != seen(found):
                raise ValueError("changed while it was read; write it elsewhere, and move it here when it is whole")
            return seen(found), content

    def header(self, path: Path, most: int) -> tuple[int, bytes]:
        """A file's size, and its first bytes: eight that hold the header's length, and the header, at most `most`.

        Raises as `content` does.
        """
        with self._opened(path) as (file, found):
            length = file.read(8)
            return found.st_size, length + file.read(min(most, int.from_bytes(length, "little")))

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[io.BufferedReader, os.stat_result]]:
        real = path.resolve(strict=True)
        if not real.is_relative_to(self._root.resolve()):
            raise ValueError("is a link out of the folder; put the file itself there")
        # Not to wait where someone put a pipe.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("is no file")
            if found.st_size > self._max_bytes:
                raise ValueError(f"has {found.st_size} bytes, and at most {self._max_bytes} are read")
            yield file, found


def seen(found: os.stat_result) -> Seen:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
