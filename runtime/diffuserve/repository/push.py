"""A deployment's folder to one or several stores: contents first, what is there already left out, the manifest last."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from diffuserve.errors import DiffuserveError, InvalidArgumentError, NotFoundError
from diffuserve.repository.errors import DamagedError
from diffuserve.repository.folder import blobs_of, export_sums, open_deployment, stored_files, unchanged
from diffuserve.repository.progress import Progress
from diffuserve.repository.store import Store, open_store
from diffuserve.repository.version import Blob, DeploymentVersion, check_name

__all__ = ["Pushed", "push"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What became of one destination. `sent` and `kept` count blobs; `error` is empty where the version is there.

    `newest` is the version that a pull of the name alone gets, where the destination had this one already.
    """

    destination: str
    name: str
    version: str
    files: int
    bytes: int
    sent: int = 0
    sent_bytes: int = 0
    kept: int = 0
    seconds: float = 0.0
    newest: str = ""
    error: str = ""

    @property
    def is_outdated(self) -> bool:
        """Whether a pull of the name alone gets another version."""
        return bool(self.newest) and self.newest != self.version


def push(
    folder: Path,
    destinations: Sequence[str],
    *,
    name: str | None = None,
    version: str | None = None,
    jobs: int = 8,
    repair: bool = False,
    progress: Progress | None = None,
) -> list[Pushed]:
    """Store the deployment in `folder` at every destination; a destination that fails leaves the others alone.

    name      by default the folder's
    version   by default made of the content's digest, so that the same files are the same version
    jobs      transfers at once, to each destination
    repair    read what is there already, and send again what is damaged; otherwise its length is enough

    Raises InvalidArgumentError or RepositoryError where there is nothing to push.
    """
    progress = progress or Progress()
    name = check_name("name", folder.resolve().name if name is None else name)
    if version is not None:
        check_name("version", version)
    stores = [open_store(url, jobs) for url in dict.fromkeys(destinations)]
    with unchanged(folder):
        files = stored_files(folder)
        local = _described(folder, files, name, version, jobs, progress)
        return progress.in_parallel(lambda store: _pushed(store, local, files, repair, progress), stores, len(stores))


def _described(
    folder: Path, files: Mapping[str, Path], name: str, version: str | None, jobs: int, progress: Progress
) -> DeploymentVersion:
    """The version that the folder is. Raises DamagedError where its files are not what the exports wrote."""
    deployment = open_deployment(folder)
    found = blobs_of(files, jobs, progress, str(folder))
    blobs = {path: blob for path, blob in found.items() if blob is not None}
    damaged = [path for path in files if path not in blobs]
    sums = export_sums(deployment)
    damaged += [path for path, digest in sums.items() if path not in blobs or blobs[path].sha256 != digest]
    if damaged:
        raise DamagedError(
            f"{folder} is not as it was exported: {', '.join(sorted(set(damaged))[:5])} changed or is gone; export "
            "again, or pull it",
            paths=sorted(set(damaged)),
        )
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    local = DeploymentVersion.of(name, version, created, deployment.checkpoints, blobs)
    try:
        return DeploymentVersion.from_json(local.to_json())
    except ValueError as error:
        raise InvalidArgumentError(f"{folder} could be pushed and not pulled again: {error}; change that") from error


def _pushed(
    store: Store, local: DeploymentVersion, files: Mapping[str, Path], repair: bool, progress: Progress
) -> Pushed:
    began, sent, kept = time.monotonic(), list[Blob](), list[Blob]()
    progress.began(store.url, sum(blob.bytes for blob in local.blobs))

    def advance(count: int) -> None:
        progress.advance(store.url, count)

    def bring(item: tuple[Blob, list[str]]) -> None:
        blob, paths = item
        if store.has(blob) and not (repair and store.problem_of(blob, lambda _: advance(0))):
            kept.append(blob)
            advance(blob.bytes)
            return
        store.send(files[paths[0]], blob, advance)
        sent.append(blob)

    error, newest = "", ""
    try:
        is_there = _is_there(store, local)
        progress.in_parallel(bring, local.blobs.items(), store.jobs)
        if is_there:
            newest = _newest(store, local.name)
        else:
            store.publish(local)
    except DiffuserveError as problem:
        error = problem.message
    return Pushed(
        destination=store.url,
        name=local.name,
        version=local.version,
        files=len(local.files),
        bytes=local.bytes,
        sent=len(sent),
        sent_bytes=sum(blob.bytes for blob in sent),
        kept=len(kept),
        seconds=round(time.monotonic() - began, 3),
        newest=newest,
        error=error,
    )


def _newest(store: Store, name: str) -> str:
    """The version that a pull of the name alone gets."""
    versions = list[DeploymentVersion]()
    for version in store.versions(name):
        with contextlib.suppress(DamagedError):
            versions.append(store.version(name, version))
    return max(versions, key=lambda one: one.created).version


def _is_there(store: Store, local: DeploymentVersion) -> bool:
    """Whether this very version is in the store. Raises InvalidArgumentError where another one has its name."""
    try:
        known = store.version(local.name, local.version)
    except NotFoundError:
        return False
    if known.content != local.content:
        raise InvalidArgumentError(
            f"{store.url} has {local.reference} with other files (pushed {known.created}), and a version never "
            "changes; push it as another --version"
        )
    return True
