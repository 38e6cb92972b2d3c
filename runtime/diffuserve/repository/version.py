"""One version of a deployment as it is stored: a small manifest of paths, and what each holds.

<prefix>/blobs/sha256/<first two digits>/<digest>    contents, each once whatever uses it
<prefix>/deployments/<name>/<version>.json           one DeploymentVersion, written last and never again

A manifest comes from storage that others may write to, so it is untrusted: it is read within limits, and no path in
it can leave the folder that it is pulled into.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from diffuserve.errors import InvalidArgumentError

__all__ = [
    "MAX_FILES",
    "MAX_MANIFEST_BYTES",
    "NEVER_STORED",
    "Blob",
    "DeploymentVersion",
    "check_name",
    "path_problem",
    "split_reference",
]

MAX_MANIFEST_BYTES: Final = 8 << 20
MAX_FILES: Final = 10_000
MAX_FILE_BYTES: Final = 128 << 30  # less than 10,000 parts of an upload

#: The key that snapshots are signed with is a secret of whoever serves, and no part of what is served.
NEVER_STORED: Final = frozenset({"snapshot.key"})

_FORMAT: Final = 1
_MAX_PATH_BYTES: Final = 512
_MAX_DEPTH: Final = 16
_MAX_CHECKPOINTS: Final = 1000
_VERSION_DIGITS: Final = 16  # of the content's digest, where a version has no name of its own
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CREATED: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\\]")


class Blob(NamedTuple):
    """A file's content: its digest in hexadecimal, and how many bytes it has."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DeploymentVersion:
    """`files` by their paths in the deployment's folder; `created` is when it was pushed, UTC in ISO 8601."""

    name: str
    version: str
    created: str
    checkpoints: tuple[str, ...]
    files: Mapping[str, Blob]

    @cached_property
    def content(self) -> str:
        """The digest of all files: what two versions with the same files have in common."""
        return _digest({path: list(blob) for path, blob in self.files.items()})

    @cached_property
    def blobs(self) -> dict[Blob, list[str]]:
        """Each content once, with the paths that hold it, the largest first."""
        paths: dict[Blob, list[str]] = {}
        for path, blob in sorted(self.files.items()):
            paths.setdefault(blob, []).append(path)
        return dict(sorted(paths.items(), key=lambda item: -item[0].bytes))

    @property
    def bytes(self) -> int:
        """Of the folder."""
        return sum(blob.bytes for blob in self.files.values())

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    @classmethod
    def of(
        cls, name: str, version: str | None, created: str, checkpoints: tuple[str, ...], files: Mapping[str, Blob]
    ) -> DeploymentVersion:
        """`version` None names it by its content: the same files are the same version."""
        nameless = cls(name=name, version="", created=created, checkpoints=checkpoints, files=files)
        version = nameless.content[:_VERSION_DIGITS] if version is None else version
        return cls(name=name, version=version, created=created, checkpoints=checkpoints, files=files)

    def to_json(self) -> str:
        facts = self._facts()
        return json.dumps({**facts, "digest": _digest(facts)}, indent=1, sort_keys=True) + "\n"

    def _facts(self) -> dict[str, Any]:
        return {
            "format_version": _FORMAT,
            "name": self.name,
            "version": self.version,
            "created": self.created,
            "checkpoints": list(self.checkpoints),
            "files": {path: blob._asdict() for path, blob in self.files.items()},
        }

    @classmethod
    def from_json(cls, text: str) -> DeploymentVersion:
        """Raises ValueError with what is wrong with the text."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes, which is the most that is read")
        try:
            raw = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(raw, dict) or raw.get("format_version") != _FORMAT:
            found = raw.get("format_version") if isinstance(raw, dict) else None
            raise ValueError(f"its format is {found!r}, and {_FORMAT} is read")
        digest = raw.pop("digest", None)
        if digest != _digest(raw):
            raise ValueError("its digest does not fit what it says")
        try:
            version = cls(
                name=_text(raw["name"], _NAME),
                version=_text(raw["version"], _NAME),
                created=_text(raw["created"], _CREATED),
                checkpoints=_checkpoints(raw["checkpoints"]),
                files=_files(raw["files"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks something, or has something of another kind: {error}") from error
        return version


def check_name(kind: str, name: str) -> str:
    """The name of a deployment or of a version. Raises InvalidArgumentError."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"the {kind} {name[:80]!r} must be letters, digits, '.', '_' and '-', begin with a letter or digit, and "
            f"have at most 64; choose another",
            input=kind,
        )
    return name


def split_reference(reference: str) -> tuple[str, str | None]:
    """Name and version of `NAME` or `NAME@VERSION`. Raises InvalidArgumentError."""
    name, at, version = reference.partition("@")
    return check_name("name", name), check_name("version", version) if at else None


def path_problem(path: str) -> str:
    """Why a deployment can have no file at `path`, which is relative and has "/" between its parts; empty if it can."""
    parts = path.split("/")
    if not path or _CONTROL.search(path) or ":" in parts[0]:
        return "is no relative path of plain characters"
    if len(path.encode(errors="surrogatepass")) > _MAX_PATH_BYTES or len(parts) > _MAX_DEPTH:
        return f"is longer than {_MAX_PATH_BYTES} bytes, or deeper than {_MAX_DEPTH} folders"
    if any(part.startswith(".") or not part for part in parts):
        return "has a part that is empty or begins with '.'"
    if any(0xD800 <= ord(letter) < 0xE000 for letter in path):
        return "is not UTF-8"
    return "is never part of a stored deployment" if path in NEVER_STORED else ""


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _text(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"it says {str(value)[:80]!r} where {pattern.pattern} is meant")
    return value


def _checkpoints(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or len(raw) > _MAX_CHECKPOINTS:
        raise ValueError("it lists no checkpoints, or too many")
    return tuple(_text(name, _NAME) for name in raw)


def _files(raw: Any) -> dict[str, Blob]:
    if not isinstance(raw, dict) or not 0 < len(raw) <= MAX_FILES:
        raise ValueError(f"it must list 1 to {MAX_FILES} files")
    files = {}
    for path, facts in raw.items():
        if problem := path_problem(path):
            raise ValueError(f"the path {path[:80]!r} {problem}")
        digest, size = facts["sha256"], facts["bytes"]
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise ValueError(f"{path[:80]!r} has {size!r} bytes, and must have 0 to {MAX_FILE_BYTES}")
        files[path] = Blob(_text(digest, _DIGEST), size)
    for path in files:
        parents = path.split("/")[:-1]
        for depth in range(len(parents)):
            if (parent := "/".join(parents[: depth + 1])) in files:
                raise ValueError(f"{parent[:80]!r} is a file, and the folder of {path[:80]!r}")
    return files
