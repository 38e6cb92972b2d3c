"""The deployment folder while an export works on it: one writer at a time, and nothing half-written is ever taken.

An export is made in `.export-*` inside the folder. When it is complete, a file `ready` says so, and it is moved into
place: the old manifest out, models in, manifest in, `deployment.json` last. A run that dies before `ready` leaves a
folder that the next run removes; one that dies after it leaves moves that the next run completes. A reader in
between finds no manifest, never a manifest with another export's models.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from diffuserve.manifest import Deployment, Manifest
from diffuserve.spec import COMPONENTS
from diffuserve.written import write_atomically
from diffuserve_export.digests import FileHashes
from diffuserve_export.errors import ExportError, OptionError
from diffuserve_export.report import Report
from diffuserve_export.shared_models import CONFIG_HEADER, all_readable, models_in_use

__all__ = ["SUMS_FILE", "Workspace", "locked_workspace", "model_name"]

SUMS_FILE: Final = "SHA256SUMS"
_STAGING: Final = ".export-"
_LOCK: Final = ".lock"
_HASHES: Final = ".hashes.json"
_READY: Final = "ready"


def model_name(name: str, component: str) -> str:
    """The Triton model of a checkpoint's component."""
    return f"{name}_{component}"


class Workspace:
    """A locked deployment folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes = FileHashes(root / _HASHES)

    def current(self, name: str, key: str) -> Manifest | None:
        """The manifest of `name` where it was made from `key` and every file is as it was written, else None."""
        deployment = self._deployment()
        if deployment is None or name not in deployment.checkpoints:
            return None
        try:
            manifest = deployment.manifest(name)
            intact = manifest.key == key and self._intact(deployment.folder(name) / SUMS_FILE)
        except (OSError, ValueError):
            return None
        return manifest if intact else None

    def _intact(self, sums: Path) -> bool:
        lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
        return bool(lines) and all(self.hashes.sha256(self.root / name) == digest for digest, name in lines)

    def _deployment(self) -> Deployment | None:
        try:
            return Deployment.load(self.root)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OptionError(
                f"{self.root / Deployment.FILE} cannot be read: {error}; remove it or {self.root}"
            ) from error

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to export into; gone afterwards, whatever happens. What was half moved from it is moved first."""
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.root))
        try:
            yield folder
        finally:
            if (folder / _READY).is_file():
                self.publish(folder, (folder / _READY).read_text(encoding="utf-8"))
            shutil.rmtree(folder, ignore_errors=True)

    def seal(self, staging: Path, name: str) -> None:
        """Write down the hash of every staged file, and of the deployment's models that its manifest names.

        In the format of `sha256sum --check` run in the deployment.
        """
        shared = models_in_use(staging) - {path.name for path in (staging / "models").glob("*")}
        folders = [(staging, staging), *((self.root, self.root / "models" / model) for model in sorted(shared))]
        files = [(root, path) for root, folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        lines = [f"{self.hashes.sha256(path)}  {path.relative_to(root).as_posix()}\n" for root, path in files]
        (staging / "checkpoints" / name / SUMS_FILE).write_text("".join(lines), encoding="utf-8")

    def publish(self, staging: Path, name: str) -> None:
        """Move a complete export into place. Can be repeated after it was interrupted."""
        write_atomically(staging / _READY, name)
        manifest, retired = staging / "checkpoints" / name, staging / "retired"
        retired.mkdir(exist_ok=True)
        if manifest.exists():
            _retire(self.root / "checkpoints" / name, retired)
            sealed = (manifest / SUMS_FILE).read_text(encoding="utf-8")
            in_use = models_in_use(self.root, but=name)
            for model in (model_name(name, component) for component in COMPONENTS):
                if f"  models/{model}/" not in sealed and model not in in_use:  # an earlier export may have had it
                    _retire(self.root / "models" / model, retired)
        for folder in sorted((staging / "models").glob("*")):
            _retire(self.root / "models" / folder.name, retired)
            _move(folder, self.root / "models" / folder.name)
        if manifest.exists():
            _move(manifest, self.root / "checkpoints" / name)
        self._retire_unused(retired)
        deployment = self._deployment()
        names = deployment.checkpoints if deployment else ()
        if name not in names:
            write_atomically(self.root / Deployment.FILE, Deployment(self.root, (*names, name)).to_json())
        (staging / _READY).unlink()

    def _retire_unused(self, retired: Path) -> None:
        """Exported models that no manifest names any more; none of them where a manifest cannot be read."""
        if not all_readable(self.root):
            return
        in_use = models_in_use(self.root)
        for config in (self.root / "models").glob("*/config.pbtxt"):
            if config.parent.name not in in_use and config.read_text(encoding="utf-8").startswith(CONFIG_HEADER):
                _retire(config.parent, retired)

    def recover(self, report: Report) -> None:
        """Complete or remove what runs that were killed left behind."""
        for folder in self.root.glob(f"{_STAGING}*"):
            if (folder / _READY).is_file():
                name = (folder / _READY).read_text(encoding="utf-8")
                report.note(f"completing an export of {name} that was interrupted")
                self.publish(folder, name)
            else:
                report.note("removing what an interrupted export left behind")
            shutil.rmtree(folder)


def _retire(folder: Path, retired: Path) -> None:
    if folder.exists():
        folder.rename(retired / f"{folder.parent.name}-{folder.name}")


def _move(folder: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    folder.rename(to)


@contextlib.contextmanager
def locked_workspace(root: Path, report: Report) -> Iterator[Workspace]:
    """Hold `root` for one export at a time, made where it is missing and removed again where nothing came of it."""
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        stream = _lock(root, report)
    except OSError as error:
        raise ExportError(f"{root} cannot be written to: {error.strerror or error}") from error
    with stream:
        workspace = Workspace(root)
        try:
            workspace.recover(report)
            yield workspace
            _save(workspace.hashes, report)
        finally:
            if made and not (root / Deployment.FILE).exists():
                _remove_own(root)


def _save(hashes: FileHashes, report: Report) -> None:
    try:
        hashes.save()
    except OSError as error:  # the export is whole without them
        report.note(f"{hashes.cache} cannot be written ({error.strerror}): the next export reads all files again")


def _remove_own(root: Path) -> None:
    """Remove what this module made in a folder, and the folder where nobody put anything else into it."""
    for file in (_HASHES, _LOCK):
        (root / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def _lock(root: Path, report: Report) -> IO[str]:
    """Wait until no other export holds `root`. Closing the stream lets go."""
    while True:
        root.mkdir(parents=True, exist_ok=True)
        stream = (root / _LOCK).open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.note(f"waiting for another export into {root}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        # The one that held it may have removed the folder, and this lock with it.
        with contextlib.suppress(FileNotFoundError):
            if (root / _LOCK).stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
        stream.close()
