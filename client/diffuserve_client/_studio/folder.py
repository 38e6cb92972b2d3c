"""The folder that a command fills."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve_client._files import write_atomically
from diffuserve_client._studio.batch import Batch, progress_shown, run_batch

if TYPE_CHECKING:
    import PIL.Image

    from diffuserve.request import GenerateRequest
    from diffuserve_client._client import Client
    from diffuserve_client._results import GenerateResult

__all__ = ["Folder", "encoded", "filled_folder", "slug", "write_told"]

_LONGEST_SLUG: Final = 40
_MARKER: Final = ".diffuserve-filling"  # there while a command fills the folder


def slug(text: str) -> str:
    """The text as a part of a file's name: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_LONGEST_SLUG].strip("-") or "picture"


# Small letters and small pictures, on sheets, want colours at full resolution.
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "png": {},
    "jpeg": {"quality": 92, "subsampling": 0},
    "webp": {"quality": 95},
}


def encoded(image: PIL.Image.Image, image_format: str) -> bytes:
    """The picture as a file in png, jpeg or webp."""
    file = io.BytesIO()
    image.save(file, image_format, **_OPTIONS[image_format])
    return file.getvalue()


@contextlib.contextmanager
def filled_folder(path: Path, *, overwrite: bool, option: str = "--output") -> Iterator[Folder]:
    """A folder of one command's own until it ends: made at once, so that it is refused before any picture is made.

    Where it was made here and nothing came of it, it goes again. `option` is what chooses it.

    Raises InvalidArgumentError where another command fills it or it holds files already, unless `overwrite`, or where
    it cannot be written to.
    """
    is_new = not path.exists()
    marker = path / _MARKER
    try:
        path.mkdir(parents=True, exist_ok=True)
        has_files = any(one != marker for one in path.iterdir())
        # Asking for permission says nothing of a full or read-only disk; trying does.
        marker.touch(exist_ok=overwrite)
    except OSError as error:
        problem = f"cannot be written to: {error.strerror}; choose another with {option}"
        if isinstance(error, FileExistsError) and path.is_dir():
            problem = f"is being filled by another command; choose another with {option}, or, where that was killed, "
            problem += "give --overwrite"
        raise InvalidArgumentError(f"the folder {path} {problem}", input="output") from error
    try:
        if has_files and not overwrite:
            raise InvalidArgumentError(
                f"the folder {path} has files already; choose another with {option}, or give --overwrite",
                input="output",
            )
        yield Folder(path)
    finally:
        with contextlib.suppress(OSError):
            marker.unlink(missing_ok=True)
            if is_new:
                path.rmdir()  # which it refuses unless it is empty


@dataclass(frozen=True)
class Folder:
    """What a command puts into its folder."""

    path: Path

    def save(self, result: GenerateResult, name: str) -> Path:
        """The picture of a result, with its generation parameters. Raises DiffuserveError."""
        path = self.path / name
        with _told(path):
            result.save(path)
        return path

    def fill(
        self, client: Client, requests: Sequence[GenerateRequest], names: Sequence[str], *, concurrency: int, what: str
    ) -> Batch:
        """Make the pictures of all requests; each is here as soon as it is there. `what` they are called on the way.

        Raises DiffuserveError where no request has a result, KeyboardInterrupt where that is why.
        """

        def on_done(index: int, result: GenerateResult) -> None:
            self.save(result, names[index])

        with progress_shown(len(requests), what) as on_event:
            batch = run_batch(client, requests, concurrency=concurrency, on_done=on_done, on_event=on_event)
        batch.raise_if_empty()
        return batch

    def write(self, name: str, data: bytes) -> Path:
        """Raises DiffuserveError."""
        return write_told(self.path / name, data)

    def write_json(self, name: str, value: Any) -> Path:
        """Raises DiffuserveError."""
        return self.write(name, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n")


def write_told(path: Path, data: bytes) -> Path:
    """Write a file, whole or not at all. Raises DiffuserveError, which says what to do."""
    with _told(path):
        write_atomically(path, data)
    return path


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiffuserveError(f"cannot write {path}: {error.strerror}; choose another place with --output") from error
