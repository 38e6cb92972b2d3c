"""A place where deployments are stored: a prefix in a bucket, or a folder, through fsspec.

fsspec and what speaks to a kind of storage are imported when an address of that kind is opened. Credentials, regions
and endpoints come from the usual environment of s3fs (AWS_PROFILE, AWS_ENDPOINT_URL, ...) and gcsfs.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from diffuserve.errors import DiffuserveError, InvalidArgumentError, NotFoundError
from diffuserve.repository.errors import DamagedError, StorageError
from diffuserve.repository.folder import blob_of
from diffuserve.repository.version import MAX_MANIFEST_BYTES, Blob, DeploymentVersion, check_name

__all__ = ["MAX_JOBS", "Store", "open_store"]

MAX_JOBS: Final = 64

#: What is asked for in one request, and sent in one part of an upload.
_PART_BYTES: Final = 16 << 20
_PACKAGES: Final = {"s3": "s3fs", "gs": "gcsfs", "file": "fsspec"}
_SAME: Final = {"gcs": "gs", "s3a": "s3"}
_ADDRESS: Final = re.compile(r"(?:(?P<protocol>[a-z0-9]+)://)?(?P<path>.*)", re.DOTALL)
_SUFFIX: Final = ".json"
_NO_BUCKET: Final = re.compile(r"bucket does not exist|NoSuchBucket")
_MAX_LISTED: Final = 10_000

Advance = Callable[[int], None]


def open_store(url: str, jobs: int) -> Store:
    """The store at s3://bucket/prefix, gs://bucket/prefix, file:///folder or a path; at most `jobs` requests at once.

    Raises InvalidArgumentError for another address, StorageError where a package is missing.
    """
    match = _ADDRESS.fullmatch(url)
    assert match is not None
    protocol = _SAME.get(match["protocol"], match["protocol"]) or "file"
    path = match["path"].rstrip("/")
    if protocol not in _PACKAGES or not path.strip("/") or "@" in path.split("/")[0]:
        raise InvalidArgumentError(
            f"{url[:200]!r} is no place for deployments; give s3://bucket/prefix, gs://bucket/prefix or a folder, and "
            "credentials in the environment"
        )
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise StorageError(
            f"{url} needs the package {_PACKAGES[protocol]}, which is not installed ({error}): "
            "pip install 'diffuserve[storage]'",
            url=url,
        ) from error
    # No listing is remembered, for others write as well.
    system = kind(use_listings_cache=False)
    store = _FolderStore if protocol == "file" else Store
    return store(url, system, str(Path(path).absolute()) if protocol == "file" else path, jobs)


@dataclass
class Store:
    """Blobs and versions under one prefix. Safe to call from several threads.

    Whatever fails raises StorageError, which names the place; a blob or a version that is not there NotFoundError.
    """

    url: str
    system: Any
    root: str
    jobs: int
    _parts: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._parts = ThreadPoolExecutor(self.jobs, "part")

    def names(self) -> list[str]:
        """The deployments that have a version here."""
        return self._listed(f"{self.root}/deployments", "")

    def versions(self, name: str) -> list[str]:
        """The versions of a deployment, which may be damaged; empty where there is none."""
        return self._listed(f"{self.root}/deployments/{check_name('name', name)}", _SUFFIX)

    def version(self, name: str, version: str) -> DeploymentVersion:
        """Raises DamagedError where the manifest is not what was written under that name."""
        path = self._version_path(name, version)
        with self._told(f"{name}@{version}"):
            # One byte more than is read, which says that there is more.
            data = self.system.cat_file(path, start=0, end=min(self._size(path), MAX_MANIFEST_BYTES + 1))
        try:
            read = DeploymentVersion.from_json(data.decode())
            if (read.name, read.version) != (name, version):
                raise ValueError(f"it is the manifest of {read.reference}")
        except ValueError as error:
            raise DamagedError(
                f"{self.url}: the manifest of {name}@{version} is damaged: {error}; take another version or another "
                "place, or push it again under another version",
                url=self.url,
            ) from error
        return read

    def publish(self, version: DeploymentVersion) -> None:
        """Write a version's manifest, where there is none. Raises InvalidArgumentError where there is."""
        path = self._version_path(version.name, version.version)
        try:
            with self._told(version.reference):
                self._create(path, version.to_json().encode())
        except FileExistsError as error:
            raise InvalidArgumentError(
                f"{self.url}: another push has just written {version.reference}; push again, or under another version"
            ) from error

    def has(self, blob: Blob) -> bool:
        """Whether the blob is there in its full length."""
        try:
            with self._told(blob.sha256):
                return self._size(self._blob_path(blob)) == blob.bytes
        except NotFoundError:
            return False

    def send(self, file: Path, blob: Blob, advance: Advance) -> None:
        """Store a file's content, and make sure that it arrived. `advance` is told of 0 bytes while it only reads.

        Raises DamagedError where the file is not what it was when its digest was taken, or another content arrived.
        """
        path = self._blob_path(blob)
        try:
            prints = _Prints.of(file, lambda _: advance(0))
        except OSError as error:
            raise _changed(file, error) from error
        if prints.blob != blob:
            raise _changed(file)
        with self._told(blob.sha256):
            try:
                self._put(file, path, advance)
            except FileNotFoundError as error:
                if file.exists():
                    raise
                raise _changed(file, error) from error
            confirmed = prints.confirmed_by(self.system.info(path))
            if not confirmed and self.digest_of(blob, lambda _: advance(0)) != blob.sha256:
                self.system.rm_file(path)
                raise DamagedError(
                    f"{self.url}: what arrived of {file} is not what was sent ({blob.sha256}), and was removed; push "
                    "again",
                    url=self.url,
                )

    def fetch(self, blob: Blob, file: Path, advance: Advance) -> None:
        """Write a blob's content to a file. `advance` is told of 0 bytes while it only reads.

        Raises DamagedError where it is not what its name says.
        """
        path = self._blob_path(blob)
        with file.open("w+b") as target:

            def fetch(start: int) -> None:
                end = min(start + _PART_BYTES, blob.bytes)
                data = self.system.cat_file(path, start=start, end=end)
                os.pwrite(target.fileno(), data, start)
                advance(len(data))

            with self._told(blob.sha256):
                if (size := self._size(path)) != blob.bytes:
                    raise self._damaged(blob, f"it has {size} bytes instead of {blob.bytes}")
                parts = [self._parts.submit(fetch, start) for start in range(0, blob.bytes, _PART_BYTES)]
                try:
                    for part in as_completed(parts):
                        part.result()
                finally:  # none of them may write once the file is closed
                    wait([part for part in parts if not part.cancel()])
        if (found := blob_of(file, lambda _: advance(0))) != blob:
            raise self._damaged(blob, f"its digest is {found.sha256}")

    def problem_of(self, blob: Blob, advance: Advance) -> str:
        """What is wrong with a blob, all of which is read; empty where nothing is."""
        try:
            with self._told(blob.sha256):
                if (size := self._size(self._blob_path(blob))) != blob.bytes:
                    return f"it has {size} bytes instead of {blob.bytes}"
            found = self.digest_of(blob, advance)
        except NotFoundError:
            return "it is missing"
        return "" if found == blob.sha256 else f"its digest is {found} instead of {blob.sha256}"

    def digest_of(self, blob: Blob, advance: Advance) -> str:
        """The digest of what is there in a blob's place, in hexadecimal."""
        digest, path = hashlib.sha256(), self._blob_path(blob)
        with self._told(blob.sha256):
            for start in range(0, blob.bytes, _PART_BYTES):
                data = self.system.cat_file(path, start=start, end=min(start + _PART_BYTES, blob.bytes))
                digest.update(data)
                advance(len(data))
        return digest.hexdigest()

    def _damaged(self, blob: Blob, how: str) -> DamagedError:
        return DamagedError(f"{self.url}: the blob {blob.sha256} is damaged: {how}", url=self.url)

    def _blob_path(self, blob: Blob) -> str:
        return f"{self.root}/blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"

    def _version_path(self, name: str, version: str) -> str:
        return f"{self.root}/deployments/{check_name('name', name)}/{check_name('version', version)}{_SUFFIX}"

    def _size(self, path: str) -> int:
        info = self.system.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def _listed(self, folder: str, suffix: str) -> list[str]:
        """The usable names below a folder, without the suffix that all must have."""
        try:
            with self._told("the list of versions"):
                entries = self.system.ls(folder, detail=False)
        except NotFoundError:
            with self._told("the bucket or folder itself"):
                self.system.ls(self._top(), detail=False)
            return []
        names = [Path(str(entry).rstrip("/")).name for entry in entries[:_MAX_LISTED]]
        names = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
        return sorted(name for name in names if _is_name(name))

    def _top(self) -> str:
        """What must be there for anything to be stored: the bucket."""
        return self.root.split("/")[0]

    def _put(self, file: Path, path: str, advance: Advance) -> None:
        from fsspec.callbacks import Callback

        class Told(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                advance(inc)

        bound = {"max_concurrency": self.jobs} if self.url.startswith("s3") else {}
        self.system.put_file(str(file), path, chunksize=_PART_BYTES, callback=Told(), **bound)

    def _create(self, path: str, data: bytes) -> None:
        """Write a file that must not be there. Raises FileExistsError where it is, if the storage can tell."""
        self.system.pipe_file(path, data, mode="create")

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever storage raises, as an error that names the place. Each package has errors of its own."""
        try:
            yield
        except (DiffuserveError, FileExistsError):
            raise
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise StorageError(
                    f"{self.url}: {error}; make the bucket, or correct its name", url=self.url
                ) from error
            raise NotFoundError(f"{self.url} does not have {what} ({error})", url=self.url) from error
        except Exception as error:
            if "PreconditionFailed" in repr(error) or getattr(error, "code", None) == 412:
                raise FileExistsError(what) from error
            raise StorageError(
                f"{self.url} cannot be used for {what}: {type(error).__name__}: {error}; see to its address and the "
                "credentials in the environment, then run this again: it goes on where it was",
                url=self.url,
            ) from error


class _FolderStore(Store):
    """A folder: what is written gets its name when it is whole."""

    def _top(self) -> str:
        return self.root

    def _put(self, file: Path, path: str, advance: Advance) -> None:
        with self._written(path) as part, file.open("rb") as source, part.open("xb") as target:
            while chunk := source.read(_PART_BYTES):
                target.write(chunk)
                advance(len(chunk))
            target.flush()
            os.fsync(target.fileno())

    def _create(self, path: str, data: bytes) -> None:
        with self._written(path, exclusive=True) as part:
            part.write_bytes(data)

    @contextlib.contextmanager
    def _written(self, path: str, exclusive: bool = False) -> Iterator[Path]:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            yield part
            if exclusive:
                os.link(part, target)
            else:
                part.replace(target)
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Prints:
    """A file's digest, and what storage may say of a content by itself: MD5, also of the parts of an upload."""

    blob: Blob
    whole: bytes
    parts: tuple[bytes, ...]

    @classmethod
    def of(cls, file: Path, advance: Advance) -> _Prints:
        """Raises OSError."""
        digest, whole, size, parts = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0, []
        with file.open("rb") as stream:
            while chunk := stream.read(_PART_BYTES):
                digest.update(chunk)
                whole.update(chunk)
                size += len(chunk)
                parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
                advance(len(chunk))
        return cls(Blob(digest.hexdigest(), size), whole.digest(), tuple(parts))

    def confirmed_by(self, info: dict[str, Any]) -> bool:
        """Whether what storage says of the content is right. It need not say anything, and an ETag need not be MD5."""
        combined = hashlib.md5(b"".join(self.parts), usedforsecurity=False).hexdigest()
        etag, md5 = str(info.get("ETag", "")).strip('"'), info.get("md5Hash", "")
        right = (self.whole.hex(), f"{combined}-{len(self.parts)}")
        return info.get("size") == self.blob.bytes and (etag in right or md5 == base64.b64encode(self.whole).decode())


def _changed(file: Path, error: OSError | None = None) -> DamagedError:
    how = f" ({error.strerror or error})" if error else ""
    return DamagedError(f"{file} has changed while it was pushed{how}; push again when nothing writes to it")


def _is_name(name: str) -> bool:
    try:
        return bool(check_name("name", name))
    except InvalidArgumentError:
        return False
