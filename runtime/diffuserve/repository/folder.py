"""A deployment's folder: what of it is stored, and whether its files are what they were."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from diffuserve.errors import InvalidArgumentError
from diffuserve.manifest import Deployment
from diffuserve.repository.errors import DamagedError, RepositoryError
from diffuserve.repository.progress import Progress
from diffuserve.repository.version import (
    MAX_FILES,
    NEVER_STORED,
    Blob,
    DeploymentVersion,
    check_name,
    path_problem,
)
from diffuserve.rollout import RolloutTable

__all__ = [
    "CHANGEABLE",
    "RECEIPT_FILE",
    "SUMS_FILE",
    "blob_of",
    "blobs_of",
    "export_sums",
    "open_deployment",
    "receipt_of",
    "stored_files",
    "unchanged",
]

#: In a folder that was pulled: the version's manifest.
RECEIPT_FILE: Final = ".pulled.json"
#: What may be written anew after a pull, as a checkpoint is exported into the folder or a rollout is decided.
CHANGEABLE: Final = frozenset({Deployment.FILE, RolloutTable.FILE})
#: An export's, beside its manifest: what it wrote.
SUMS_FILE: Final = "SHA256SUMS"

_LOCK_FILE: Final = ".lock"  # an export's, while it writes
_LEFT_OUT: Final = "__pycache__"  # Python's own, made anew by whoever serves
_CHUNK: Final = 1 << 20
_MAX_SUMS_BYTES: Final = 8 << 20


def open_deployment(root: Path) -> Deployment:
    """The deployment in a folder, with every checkpoint's manifest known to be readable. Raises RepositoryError."""
    try:
        deployment = Deployment.load(root)
        for name in deployment.checkpoints:
            deployment.manifest(check_name("checkpoint", name))
    except (OSError, ValueError) as error:
        raise RepositoryError(
            f"{root} is no whole deployment: {error}; give a folder that `make export` wrote"
        ) from error
    return deployment


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    """No export writes into the folder meanwhile. Raises RepositoryError where one does."""
    try:
        stream = (root / _LOCK_FILE).open("rb")
    except FileNotFoundError:  # pulled, and nothing was exported into it
        yield
        return
    except OSError as error:
        raise RepositoryError(f"{root / _LOCK_FILE} cannot be read: {error.strerror}; let this user read it") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RepositoryError(f"a checkpoint is being exported into {root}; wait until it is done") from error
        yield


def stored_files(root: Path) -> dict[str, Path]:
    """What is stored of a deployment: every file but hidden ones, keys and Python's caches, by its relative path.

    Raises InvalidArgumentError for links and for what is no file, RepositoryError for what cannot be read.
    """
    found: dict[str, Path] = {}
    for relative, path in _walk(root, ""):
        if problem := path_problem(relative):
            raise InvalidArgumentError(f"{str(path)[:200]!r} {problem}; rename or remove it")
        found[relative] = path
        if len(found) > MAX_FILES:
            raise InvalidArgumentError(f"{root} holds more than {MAX_FILES} files, which is no deployment of ours")
    return found


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise RepositoryError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in listed:
        relative, path = f"{prefix}{entry.name}", Path(entry.path)
        if entry.name.startswith(".") or entry.name == _LEFT_OUT or relative in NEVER_STORED:
            continue
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(path, f"{relative}/")
        elif stat.S_ISREG(mode):
            yield relative, path
        else:
            kind = "a link" if stat.S_ISLNK(mode) else "no file"
            raise InvalidArgumentError(f"{path} is {kind}; put the file itself there, or remove it")


def blob_of(path: Path, advance: Callable[[int], None] = lambda _: None) -> Blob:
    """Digest and size of a file, which is read. `advance` is told of bytes as they are. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
    return Blob(digest.hexdigest(), size)


def blobs_of(files: Mapping[str, Path], jobs: int, progress: Progress, label: str) -> dict[str, Blob | None]:
    """Digest and size of each file; None of one that is not there or cannot be read."""

    def sized(path: Path) -> int:
        try:
            return path.lstat().st_size
        except OSError:
            return 0

    def hashed(path: Path) -> Blob | None:
        try:
            return blob_of(path, lambda count: progress.advance(label, count))
        except OSError:
            return None

    progress.began(label, sum(map(sized, files.values())))
    return dict(zip(files, progress.in_parallel(hashed, files.values(), jobs), strict=True))


def export_sums(deployment: Deployment) -> dict[str, str]:
    """What the exports wrote down of their files when they made them: digests by path.

    Raises DamagedError where a checkpoint has no such list, or one that cannot be read.
    """
    sums: dict[str, str] = {}
    for name in deployment.checkpoints:
        file = deployment.folder(name) / SUMS_FILE
        try:
            if file.stat().st_size > _MAX_SUMS_BYTES:
                raise ValueError("it is too large")
            lines = file.read_text(encoding="utf-8").splitlines()
            listed = {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
        except (OSError, ValueError) as error:
            raise DamagedError(f"{file} cannot be read: {error}; export {name} again, or pull it") from error
        if any(path_problem(path) for path in listed):
            raise DamagedError(f"{file} lists files out of the folder; export {name} again, or pull it")
        sums |= listed
    return sums


def receipt_of(root: Path) -> DeploymentVersion | None:
    """The version that the folder was pulled as; None where it was not. Raises DamagedError."""
    file = root / RECEIPT_FILE
    try:
        return DeploymentVersion.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file} cannot be read: {error}; pull again") from error
