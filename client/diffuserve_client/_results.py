"""What `generate` returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._events import decoded
from diffuserve_client._files import FORMAT_OF_SUFFIX, numbered, write_atomically

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["GenerateResult", "GeneratedImage", "result_from"]


@dataclass(frozen=True)
class GeneratedImage:
    """One picture as the server encoded it.

    `data` is the encoded picture in `format` (png, jpeg, webp), also where base64 carried it here; `info` holds
    what the server tells of it; `request` is what it was asked for with.
    """

    index: int
    seed: int
    format: str
    data: bytes = field(repr=False)
    info: Mapping[str, Any]
    request: GenerateRequest = field(repr=False)

    @cached_property
    def image(self) -> PIL.Image.Image:
        """The picture decoded, the first time it is asked for. Raises OSError where it cannot be."""
        return decoded(self.data)

    def save(self, path: str | os.PathLike[str], *, metadata: bool = True) -> Path:
        """Write the encoded picture, its pixels as they came; the file is whole or not there.

        With `metadata` the file says how it was made: the web UIs' `parameters`, and what GenerateRequest.from_image
        reads. A picture that is not whole is written as it came.

        Raises InvalidArgumentError where the name says another format, OSError where it cannot be written.
        """
        path = Path(path)
        named = FORMAT_OF_SUFFIX.get(path.suffix.lower(), self.format)
        if named != self.format:
            raise InvalidArgumentError(
                f"the picture is {self.format}, and {path.name} says {named}; ask for image_format={named!r}, or "
                "convert it with .image.save",
                input="path",
                value=path.name,
            )
        write_atomically(path, self.to_bytes(metadata=metadata))
        return path

    def to_bytes(self, *, metadata: bool = True) -> bytes:
        """What `save` writes."""
        from diffuserve.metadata import Record, with_record

        if not metadata:
            return self.data
        try:
            return with_record(self.data, self.format, Record.of(self.request, self.format, self.seed, self.info))
        except (ValueError, DiffuserveError):  # a server's mistakes are no reason to lose the picture
            return self.data


@dataclass(frozen=True)
class GenerateResult:
    """Every picture of one request, in order.

    `request` is what was sent, with its seed drawn, so that it makes the same pictures again; `request_id` is what the
    server's log calls it; `index` is its place among the requests of `generate_many`.
    """

    request: GenerateRequest
    images: tuple[GeneratedImage, ...]
    request_id: str = ""
    index: int = 0

    @property
    def image(self) -> PIL.Image.Image:
        """The first picture, decoded."""
        return self.images[0].image

    def save(self, path: str | os.PathLike[str], *, metadata: bool = True) -> tuple[Path, ...]:
        """Save every picture: one as `path`, several as out-0.png, out-1.png and so on. Raises as GeneratedImage.save.

        Returns the files' paths.
        """
        paths = numbered(Path(path), len(self.images))
        return tuple(image.save(one, metadata=metadata) for image, one in zip(self.images, paths, strict=True))


def result_from(
    request: GenerateRequest, events: Iterable[Event], request_id: str = "", index: int = 0
) -> GenerateResult:
    """The result that a request's image events make, in whatever order they came."""
    images = (
        GeneratedImage(
            index=event.index,
            seed=event.seed,
            format=event.info.get("image_format", request.image_format),
            data=event.data,
            info=event.info,
            request=request,
        )
        for event in events
    )
    in_order = tuple(sorted(images, key=lambda image: image.index))
    return GenerateResult(request=request, images=in_order, request_id=request_id, index=index)
