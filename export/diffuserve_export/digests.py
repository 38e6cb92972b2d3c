"""Hashes of files, remembered by what the file system says of them, and the key of an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import diffuserve
from diffuserve.written import write_atomically

__all__ = ["FileHashes", "export_key"]

_PACKAGES: Final = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers", "tokenizers")
# Of the runtime package, what decides what an export writes.
_RUNTIME_FILES: Final = ("spec.py", "manifest.py", "profiles.py")


class FileHashes:
    """SHA-256 of files. A file with the same inode, size and times as when it was last read is not read again."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        try:
            known = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, Any] = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        """The hash in hexadecimal. Raises FileNotFoundError."""
        real = path.resolve()
        stat = real.stat()
        seen = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = self.known.get(str(real))
        if not (isinstance(entry, list) and entry[:-1] == seen):
            with real.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
            entry = [*seen, digest.hexdigest()]
            self.known[str(real)] = entry
        return str(entry[-1])

    def save(self) -> None:
        """Raises OSError."""
        self.known = {name: entry for name, entry in self.known.items() if Path(name).exists()}
        write_atomically(self.cache, json.dumps(self.known))


def _digest(stream: Any) -> Any:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest


def export_key(files: Mapping[str, Path], options: Mapping[str, Any], hashes: FileHashes) -> str:
    """The hash of everything that decides an export's output: the checkpoint's files, options, code and versions."""
    facts = {
        "files": {name: hashes.sha256(path) for name, path in sorted(files.items())},
        "options": dict(options),
        "code": _code_hash(_code_files()),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _code_files() -> Iterable[Path]:
    runtime = Path(diffuserve.__file__).parent
    own = [path for path in Path(__file__).parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [*sorted(own), *(runtime / name for name in _RUNTIME_FILES)]


def _code_hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
