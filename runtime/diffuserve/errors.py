"""Every error that crosses the wire.

    DiffuserveError
    ├── InvalidArgumentError   invalid_argument   a value is outside what is accepted
    ├── NotFoundError          not_found          a checkpoint that is not deployed
    ├── UnsupportedError       unsupported        a known input or combination that this server does not build
    ├── UnavailableError                          try again later, or elsewhere
    │   ├── QueueFullError     queue_full
    │   ├── DeadlineError      deadline
    │   └── DrainingError      draining
    ├── CancelledError         cancelled          the client went away or cancelled
    ├── ComponentFailedError   component_failed   an engine or its process failed
    └── InternalError          internal           a bug in the server

Triton's statuses are few, so the code travels in the message: `[code] sentence {"detail": ...}`.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Final

__all__ = [
    "DEAD_PROCESS",
    "CancelledError",
    "ComponentFailedError",
    "DeadlineError",
    "DiffuserveError",
    "DrainingError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "QueueFullError",
    "UnavailableError",
    "UnsupportedError",
    "from_wire",
]

#: What Triton says of a Python model whose process is gone, while it goes on saying that the model is ready.
DEAD_PROCESS: Final = re.compile(r"[Ss]tub process .*is not healthy")


class DiffuserveError(Exception):
    """The root. `detail` holds what a program may branch on: the input's name, its value, the limit."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail

    def to_wire(self) -> str:
        """The text that Triton carries to the client."""
        text = f"[{self.code}] {self.message}"
        return f"{text} {json.dumps({'detail': self.detail}, default=str)}" if self.detail else text


class InvalidArgumentError(DiffuserveError):
    code = "invalid_argument"


class NotFoundError(DiffuserveError):
    code = "not_found"


class UnsupportedError(DiffuserveError):
    code = "unsupported"


class UnavailableError(DiffuserveError):
    code = "unavailable"


class QueueFullError(UnavailableError):
    code = "queue_full"


class DeadlineError(UnavailableError):
    code = "deadline"


class DrainingError(UnavailableError):
    code = "draining"


class CancelledError(DiffuserveError):
    code = "cancelled"


class ComponentFailedError(DiffuserveError):
    code = "component_failed"


class InternalError(DiffuserveError):
    code = "internal"


_BY_CODE: Final[dict[str, type[DiffuserveError]]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        NotFoundError,
        UnsupportedError,
        UnavailableError,
        QueueFullError,
        DeadlineError,
        DrainingError,
        CancelledError,
        ComponentFailedError,
        InternalError,
    )
}
_WIRE: Final = re.compile(
    rf"\[(?P<code>{'|'.join(_BY_CODE)})\] (?P<message>.*?)(?: (?P<detail>\{{\"detail\": .*\}}))?\Z", re.DOTALL
)


def from_wire(text: str) -> DiffuserveError | None:
    """The error that a server's text carries, or None where the text is not one of ours."""
    # Triton puts words of its own before ours when an error passed through a child request, some in brackets.
    match = _WIRE.search(text)
    if match is None:
        return None
    try:
        detail = json.loads(match["detail"])["detail"] if match["detail"] else {}
    except ValueError:
        detail = {}
    error = _BY_CODE[match["code"]](match["message"])
    error.detail = detail if isinstance(detail, dict) else {}
    return error
