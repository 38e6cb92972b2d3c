"""A stored version to a folder: fetched beside it, checked, and renamed when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffuserve.errors import DiffuserveError, InvalidArgumentError, NotFoundError
from diffuserve.repository.errors import DamagedError, RepositoryError
from diffuserve.repository.folder import RECEIPT_FILE, blob_of, open_deployment, receipt_of
from diffuserve.repository.progress import Progress
from diffuserve.repository.store import Store, open_store
from diffuserve.repository.verify import exported_since, verify_folder
from diffuserve.repository.version import Blob, DeploymentVersion, split_reference

__all__ = ["Pulled", "pull"]

_PARTS: Final = ".parts"
_LOCK: Final = ".lock"
_SPARE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """`fetched` and `kept` count blobs; `problems` are what sources had that was of no use; it worked all the same."""

    folder: str
    name: str
    version: str
    created: str
    files: int
    bytes: int
    fetched: int
    fetched_bytes: int
    kept: int
    seconds: float
    problems: tuple[str, ...]


def pull(
    sources: Sequence[str], reference: str, out: Path, *, jobs: int = 8, progress: Progress | None = None
) -> Pulled:
    """Restore NAME (the version whose first push was the last) or NAME@VERSION as the folder `out`, which must be new.

    Each source is tried in turn, for the manifest and for every blob. An interrupted pull goes on when it is run
    again; what it has is read again before it is trusted. Where `out` is that very version, nothing is done.

    Raises NotFoundError where no source has it, DamagedError where no source has it whole, StorageError where none can
    be reached, InvalidArgumentError where `out` is something else, RepositoryError where it cannot be written.
    """
    name, version = split_reference(reference)
    one = _Pull([open_store(url, jobs) for url in dict.fromkeys(sources)], jobs, progress or Progress())
    wanted = one.chosen(name, version)
    try:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            one.compare(wanted, out)
        else:
            one.restore(wanted, out)
    except OSError as error:
        raise RepositoryError(
            f"{error.filename or out} cannot be written: {error.strerror}; run this again when it can: it goes on "
            "where it was"
        ) from error
    return one.report(wanted, out)


class _Pull:
    """One pull under way."""

    def __init__(self, stores: Sequence[Store], jobs: int, progress: Progress) -> None:
        self._stores, self._jobs, self._progress = stores, jobs, progress
        self._began = time.monotonic()
        self._problems: list[str] = []
        self._fetched: list[Blob] = []
        self._kept = 0
        self._lock = threading.Lock()

    def chosen(self, name: str, version: str | None) -> DeploymentVersion:
        """The version that is meant, from the first source that has it; without one, the newest of all sources."""
        found, errors = list[DeploymentVersion](), list[DiffuserveError]()
        for store in self._stores:
            try:
                for one in store.versions(name) if version is None else [version]:
                    try:
                        found.append(store.version(name, one))
                    except DamagedError as error:
                        errors.append(error)
            except DiffuserveError as error:
                errors.append(error)
        self._problems += [error.message for error in errors if not isinstance(error, NotFoundError)]
        if found:
            return found[0] if version else max(found, key=lambda one: one.created)
        serious = [error for error in errors if not isinstance(error, NotFoundError)]
        if serious:
            raise serious[0]
        asked = name if version is None else f"{name}@{version}"
        places = ", ".join(store.url for store in self._stores)
        raise NotFoundError(f"{places} has no {asked}; `diffuserve repository list` shows what there is")

    def compare(self, wanted: DeploymentVersion, out: Path) -> None:
        """Raises where `out`, which is there, is not that version whole."""
        receipt = receipt_of(out) if out.is_dir() and not out.is_symlink() else None
        if receipt is None or receipt.content != wanted.content:
            is_what = f"holds {receipt.reference}" if receipt else "exists already"
            raise InvalidArgumentError(f"{out} {is_what}; choose another folder with --out, or move it away first")
        if problems := verify_folder(out, self._jobs, self._progress).problems:
            listed = "; ".join(f"{one.path}: {one.problem}" for one in problems[:5])
            raise DamagedError(f"{out} holds {receipt.reference}, damaged ({listed}); move it away and pull again")
        if anew := exported_since(receipt, open_deployment(out)):
            raise InvalidArgumentError(
                f"{out} holds {receipt.reference}, but {', '.join(anew)} was exported into it since; choose another "
                "folder with --out, or move it away first"
            )
        self._kept = len(wanted.blobs)

    def restore(self, wanted: DeploymentVersion, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _staging(out, wanted) as staging:
            self._check_disk(staging, wanted)
            self._progress.began(out.name, sum(blob.bytes for blob in wanted.blobs))
            (staging / _PARTS).mkdir(exist_ok=True)
            self._progress.in_parallel(
                lambda item: self._bring(staging, *item, out.name), wanted.blobs.items(), self._jobs
            )
            shutil.rmtree(staging / _PARTS)
            _remove_others(staging, wanted)
            (staging / RECEIPT_FILE).write_text(wanted.to_json(), encoding="utf-8")
            open_deployment(staging)
            staging.rename(out)
            (out / _LOCK).unlink(missing_ok=True)

    def _bring(self, staging: Path, blob: Blob, paths: list[str], label: str) -> None:
        """One content, to all the files that hold it."""
        first = staging / paths[0]
        if _is_whole(first, blob, lambda _: self._progress.advance(label, 0)):
            self._kept_one()
            self._progress.advance(label, blob.bytes)
        else:
            part = staging / _PARTS / blob.sha256
            self._fetch(blob, part, paths[0], label)
            first.parent.mkdir(parents=True, exist_ok=True)
            part.replace(first)
        for path in paths[1:]:
            other = staging / path
            self._progress.advance(label, 0)
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first, other)

    def _kept_one(self) -> None:
        with self._lock:
            self._kept += 1

    def _fetch(self, blob: Blob, part: Path, path: str, label: str) -> None:
        problems = list[DiffuserveError]()
        for store in self._stores:
            done = [0]

            def advance(count: int, done: list[int] = done) -> None:
                with self._lock:
                    done[0] += count
                self._progress.advance(label, count)

            try:
                store.fetch(blob, part, advance)
            except DiffuserveError as error:
                problems.append(error)
                self._progress.advance(label, -done[0])
            else:
                with self._lock:
                    self._fetched.append(blob)
                    self._problems += [f"{path}: {error.message}" for error in problems]
                return
        part.unlink(missing_ok=True)
        every = "; ".join(error.message for error in problems)
        kinds = {type(error) for error in problems}
        kind = kinds.pop() if len(kinds) == 1 else DamagedError
        kind = DamagedError if kind is NotFoundError else kind
        raise kind(f"{path} cannot be fetched from any source: {every}", path=path)

    def _check_disk(self, staging: Path, wanted: DeploymentVersion) -> None:
        there = sum(path.lstat().st_size for path in staging.rglob("*") if path.is_file())
        needed, free = wanted.bytes - there + _SPARE_BYTES, shutil.disk_usage(staging).free
        if free < needed:
            raise RepositoryError(
                f"{staging.parent} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed"
            )

    def report(self, wanted: DeploymentVersion, out: Path) -> Pulled:
        return Pulled(
            folder=str(out),
            name=wanted.name,
            version=wanted.version,
            created=wanted.created,
            files=len(wanted.files),
            bytes=wanted.bytes,
            fetched=len(self._fetched),
            fetched_bytes=sum(blob.bytes for blob in self._fetched),
            kept=self._kept,
            seconds=round(time.monotonic() - self._began, 3),
            problems=tuple(self._problems),
        )


@contextlib.contextmanager
def _staging(out: Path, wanted: DeploymentVersion) -> Iterator[Path]:
    """The folder that a pull of this version works in, and an earlier one may have; for one pull at a time."""
    folder = out.absolute().with_name(f".{out.absolute().name}.{wanted.content[:16]}.pull")
    if folder.is_symlink() or (folder.exists() and not _is_plain(folder)):
        raise InvalidArgumentError(f"{folder} holds links or other things that no pull makes; remove it")
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RepositoryError(f"another pull works in {folder}; wait until it is done") from error
        yield folder


def _is_plain(folder: Path) -> bool:
    """Whether there are only folders and files in it, so that no path in it leads elsewhere."""
    modes = (Path(root, name).lstat().st_mode for root, *lists in os.walk(folder) for one in lists for name in one)
    return all(stat.S_ISDIR(mode) or stat.S_ISREG(mode) for mode in modes)


def _is_whole(file: Path, blob: Blob, advance: Callable[[int], None]) -> bool:
    try:
        return file.lstat().st_size == blob.bytes and blob_of(file, advance) == blob
    except OSError:
        return False


def _remove_others(staging: Path, wanted: DeploymentVersion) -> None:
    """A folder of the same content has no other files, whatever was put there meanwhile."""
    for path in staging.rglob("*"):
        relative = path.relative_to(staging).as_posix()
        if path.is_file() and relative not in wanted.files and relative != _LOCK:
            path.unlink()
