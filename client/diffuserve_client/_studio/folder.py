"""The folder that a command fills."""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
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

__all__ = ["Folder", "encoded", "slug", "write_told"]

_LONGEST_SLUG: Final = 40


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


class Folder:
    """A folder of a command's own: made at once, so that it is refused before any picture is made.

    Raises InvalidArgumentError where it holds files already, unless `overwrite`, or cannot be written to.
    """

    def __init__(self, path: Path, *, overwrite: bool, option: str = "--output") -> None:
        """`option` is what chooses it."""
        self.path = path
        self._is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_empty = not any(path.iterdir())
            # Asking for permission says nothing of a full or read-only disk; trying does.
            probe = path / f".{secrets.token_hex(4)}.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidArgumentError(
                f"the folder {path} cannot be written to: {error.strerror}; choose another with {option}",
                input="output",
            ) from error
        if not (is_empty or overwrite):
            raise InvalidArgumentError(
                f"the folder {path} has files already; choose another with {option}, or give --overwrite",
                input="output",
            )

    def drop(self) -> None:
        """Remove it again where it was made here and nothing came of it."""
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.path.rmdir()

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
        self.check_filled(batch)
        return batch

    def check_filled(self, batch: Batch) -> None:
        """Where nothing was made the folder goes again. Raises the batch's first error, or KeyboardInterrupt."""
        if batch.is_empty:
            self.drop()
            batch.raise_first()

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
