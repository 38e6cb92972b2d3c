"""What a stream yields: an Event for each kind, with what is particular to it."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from diffuserve.request import Event

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "ImageEvent",
    "PictureEvent",
    "PreviewEvent",
    "ProgressEvent",
    "QueuedEvent",
    "SnapshotEvent",
    "decoded",
    "typed",
]


def decoded(data: bytes) -> PIL.Image.Image:
    """An encoded picture. Raises OSError where it is none."""
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(data))
        image.load()
    except (PIL.Image.DecompressionBombError, SyntaxError) as error:  # neither of which is an OSError
        raise OSError(f"the picture cannot be decoded: {error}") from error
    return image


@dataclass(frozen=True, kw_only=True)
class QueuedEvent(Event):
    """The server accepted the request. Sent where `progress_every` is above 0."""

    @property
    def eta_s(self) -> float:
        """Seconds until its last picture is expected."""
        return float(self.info["eta_ms"]) / 1000


@dataclass(frozen=True, kw_only=True)
class ProgressEvent(Event):
    """`step` of `steps` denoising steps of image `index` are done. Sent every `progress_every` steps."""


@dataclass(frozen=True, kw_only=True)
class PictureEvent(Event):
    """An event with a picture."""

    @cached_property
    def image(self) -> PIL.Image.Image:
        """The picture decoded, the first time it is asked for. Raises OSError where it cannot be."""
        return decoded(self.data)


@dataclass(frozen=True, kw_only=True)
class PreviewEvent(PictureEvent):
    """A small picture of what image `index` is becoming. Sent every `preview_every` steps."""


@dataclass(frozen=True, kw_only=True)
class ImageEvent(PictureEvent):
    """Image `index` is done: `data` is the encoded picture, `info` every parameter that made it, and its times."""


@dataclass(frozen=True, kw_only=True)
class SnapshotEvent(Event):
    """The server shuts down: `data` is what another one goes on from. A client that may retry does so by itself."""


_KINDS: Final[dict[str, type[Event]]] = {
    "queued": QueuedEvent,
    "progress": ProgressEvent,
    "preview": PreviewEvent,
    "image": ImageEvent,
    "snapshot": SnapshotEvent,
}


def typed(event: Event, **changes: Any) -> Event:
    """The event as its kind's class; `heartbeat` and `status` stay Events."""
    kind = _KINDS.get(event.kind, Event)
    if type(event) is kind:
        return replace(event, **changes) if changes else event
    return kind(**({one.name: getattr(event, one.name) for one in fields(Event)} | changes))
