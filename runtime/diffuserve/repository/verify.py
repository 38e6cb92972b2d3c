"""Whether a deployment is what it was: a folder by what was written down of it, a store's blobs by their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffuserve.errors import NotFoundError
from diffuserve.manifest import Deployment
from diffuserve.repository.errors import DamagedError
from diffuserve.repository.folder import (
    CHANGEABLE,
    SUMS_FILE,
    blob_of,
    blobs_of,
    export_sums,
    open_deployment,
    receipt_of,
)
from diffuserve.repository.progress import Progress
from diffuserve.repository.store import Store, open_store
from diffuserve.repository.version import Blob, DeploymentVersion, split_reference

__all__ = [
    "Listed",
    "Listing",
    "Problem",
    "Verified",
    "exported_since",
    "list_versions",
    "verify_folder",
    "verify_store",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """`of` is the folder, or the version NAME@VERSION that has the file at `path`."""

    of: str
    path: str
    problem: str


@dataclass(frozen=True, slots=True)
class Verified:
    """`files` and `bytes` are what was read: of a store, each blob once."""

    files: int
    bytes: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A stored version. `own_bytes` are of contents that no other listed version has."""

    name: str
    version: str
    created: str
    checkpoints: tuple[str, ...]
    files: int
    bytes: int
    own_bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """`bytes` are of all contents, each counted once; `problems` are manifests that cannot be read."""

    versions: tuple[Listed, ...]
    bytes: int
    problems: tuple[str, ...]


def verify_folder(root: Path, jobs: int = 8, progress: Progress | None = None) -> Verified:
    """Read every file that an export wrote down, or that came with a pull, and compare its digest.

    What may change in a folder that is served (textual inversions that were added, say) is no problem, unless it came
    with a pull and is another since; nor is a checkpoint that was exported into it since, as it was written.

    Raises RepositoryError where the folder is no deployment.
    """
    deployment = open_deployment(root)
    expected, problems = dict[str, str](), list[Problem]()
    try:
        receipt = receipt_of(root)
        if receipt is not None:
            expected |= _still_expected(receipt, deployment)
        expected |= export_sums(deployment)
    except DamagedError as error:
        problems.append(Problem(str(root), "", error.message))
    found = blobs_of({path: root / path for path in expected}, jobs, progress or Progress(), str(root))
    for path, digest in sorted(expected.items()):
        blob = found[path]
        if blob is None:
            problems.append(Problem(str(root), path, "it is missing, or cannot be read"))
        elif blob.sha256 != digest:
            problems.append(Problem(str(root), path, f"its digest is {blob.sha256} instead of {digest}"))
    return Verified(len(expected), sum(blob.bytes for blob in found.values() if blob), tuple(problems))


def _still_expected(receipt: DeploymentVersion, deployment: Deployment) -> dict[str, str]:
    """Digests of what came with a pull, without what belongs to a checkpoint that was exported into the folder since.

    An export writes a checkpoint's manifest and list of digests anew, and removes models that no manifest names then.
    """
    pulled = {path: blob.sha256 for path, blob in receipt.files.items() if path not in CHANGEABLE}
    anew = exported_since(receipt, deployment)
    if not anew:
        return pulled
    manifests = [deployment.manifest(name) for name in deployment.checkpoints if name not in anew]
    models = {one.model for manifest in manifests for one in manifest.components.values()}

    def is_expected(path: str) -> bool:
        top, _, rest = path.partition("/")
        one = rest.partition("/")[0]
        return not (top == "checkpoints" and one in anew) and not (top == "models" and one not in models)

    return {path: digest for path, digest in pulled.items() if is_expected(path)}


def exported_since(receipt: DeploymentVersion, deployment: Deployment) -> tuple[str, ...]:
    """The pulled checkpoints that were exported anew into the folder: both files that say what one is are others.

    One file alone would be damage.
    """

    def is_anew(name: str) -> bool:
        paths = [f"checkpoints/{name}/{file}" for file in ("manifest.json", SUMS_FILE)]
        try:
            return all(
                path in receipt.files and blob_of(deployment.root / path) != receipt.files[path] for path in paths
            )
        except OSError:
            return False

    return tuple(name for name in deployment.checkpoints if is_anew(name))


def verify_store(
    url: str, reference: str | None = None, *, jobs: int = 8, progress: Progress | None = None
) -> Verified:
    """Read every blob of a version, of all versions of NAME, or of everything that is stored.

    Raises NotFoundError where there is no such version, StorageError where the storage cannot be used.
    """
    progress, store = progress or Progress(), open_store(url, jobs)
    name, version = split_reference(reference) if reference else (None, None)
    problems, users = list[Problem](), dict[Blob, list[tuple[str, str]]]()
    for one in _versions(store, name, version):
        if isinstance(one, DamagedError):
            problems.append(Problem(reference or url, "", one.message))
            continue
        for path, blob in one.files.items():
            users.setdefault(blob, []).append((one.reference, path))
    progress.began(url, sum(blob.bytes for blob in users))
    found = progress.in_parallel(
        lambda blob: store.problem_of(blob, lambda count: progress.advance(url, count)), users, jobs
    )
    for blob, problem in zip(users, found, strict=True):
        problems += [Problem(of, path, problem) for of, path in users[blob] if problem]
    return Verified(len(users), sum(blob.bytes for blob in users), tuple(problems))


def list_versions(url: str, name: str | None = None, *, jobs: int = 8) -> Listing:
    """What is stored, the newest of each name first. Raises StorageError where the storage cannot be used."""
    versions, problems = list[DeploymentVersion](), list[str]()
    for one in _versions(open_store(url, jobs), name, None):
        if isinstance(one, DamagedError):
            problems.append(one.message)
        else:
            versions.append(one)
    users: dict[Blob, int] = {}
    for blob in (blob for one in versions for blob in one.blobs):
        users[blob] = users.get(blob, 0) + 1
    versions.sort(key=lambda one: one.created, reverse=True)
    versions.sort(key=lambda one: one.name)
    listed = (
        Listed(
            name=one.name,
            version=one.version,
            created=one.created,
            checkpoints=one.checkpoints,
            files=len(one.files),
            bytes=one.bytes,
            own_bytes=sum(blob.bytes for blob in one.blobs if users[blob] == 1),
        )
        for one in versions
    )
    return Listing(tuple(listed), sum(blob.bytes for blob in users), tuple(problems))


def _versions(store: Store, name: str | None, version: str | None) -> Iterator[DeploymentVersion | DamagedError]:
    """The versions that are meant, and of those whose manifest is damaged the error. Raises NotFoundError for none."""
    if name is not None and version is not None:
        meant = [(name, version)]
    else:
        names = store.names() if name is None else [name]
        meant = [(one, its) for one in names for its in store.versions(one)]
    if name is not None and not meant:
        raise NotFoundError(f"{store.url} has no {name}; `diffuserve repository list {store.url}` shows what there is")

    def read(one: tuple[str, str]) -> DeploymentVersion | DamagedError:
        try:
            return store.version(*one)
        except DamagedError as error:
            return error

    yield from Progress().in_parallel(read, meant, store.jobs)
