"""What the synchronous and the asynchronous client have in common: everything but waiting."""

from __future__ import annotations

import inspect
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._endpoints import Endpoints
from diffuserve_client._events import PictureEvent
from diffuserve_client._results import GenerateResult, result_from
from diffuserve_client._retry import Retry
from diffuserve_client._security import Security, Tls
from diffuserve_client._timeout import Timeout

__all__ = ["DEFAULT_URL", "Collector", "Session"]

DEFAULT_URL: Final = "localhost:8001"
_WEB_ADDRESS: Final = re.compile(r"(?:https?|grpcs?)://")
_PORT: Final = re.compile(r"[^:]:([0-9]{1,5})\Z")
_LAST_PORT: Final = 65535
_MOST_ID_BYTES: Final = 256


class Session:
    """Where a client's requests may go, and on what terms.

    Raises InvalidArgumentError for addresses, timeouts or credentials that cannot be meant.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        timeout: Timeout | float | None,
        retry: Retry | None,
        tls: Tls | None,
        token: str | None,
        headers: Mapping[str, str] | None,
    ) -> None:
        self.urls: Final = _checked((url,) if isinstance(url, str) else tuple(url))
        self.timeout: Final = Timeout() if timeout is None else Timeout.of(timeout)
        self.retry: Final = Retry() if retry is None else retry
        self.security: Final = Security(tls, token, {} if headers is None else headers)
        for one in self.urls:
            self.security.check(one)
        self.endpoints: Final = Endpoints(self.urls, self.retry, time.monotonic)

    def delivery(self, request: GenerateRequest, request_id: str | None) -> Any:
        """The Delivery of a request. Raises InvalidArgumentError for an id that cannot be one."""
        # gRPC takes most of a second to import; whoever only reads types or --help should not wait for it.
        from diffuserve_client._delivery import Delivery

        if request_id is not None:
            _check_id(request_id)
        return Delivery(
            request,
            request_id=request_id or uuid.uuid4().hex,
            endpoints=self.endpoints,
            retry=self.retry,
            timeout=self.timeout,
            clock=time.monotonic,
        )


class Collector:
    """Makes a result of a request's events, and calls who wants to hear of them. Raises TypeError."""

    def __init__(
        self,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
    ) -> None:
        for given in (on_progress, on_preview):
            if inspect.iscoroutinefunction(given):  # which would be called, and never run
                raise TypeError(f"{given.__name__} is a coroutine function; give a plain one, or use `stream`")
        self._on_progress = on_progress
        self._on_preview = on_preview
        self._images: list[Event] = []

    def take(self, event: Event) -> None:
        if event.kind == "image":
            self._images.append(event)
        elif event.kind == "progress" and self._on_progress is not None:
            self._on_progress(event)
        elif event.kind == "preview" and self._on_preview is not None and isinstance(event, PictureEvent):
            self._on_preview(event)

    def result(self, request: GenerateRequest, request_id: str, index: int = 0) -> GenerateResult:
        return result_from(request, self._images, request_id, index)

    def tell_done(self, error: DiffuserveError, request: GenerateRequest) -> None:
        """Put the pictures that were done into an error after which the rest can be made elsewhere."""
        if "snapshot" in error.detail:
            error.detail["images"] = result_from(request, self._images).images


def _check_id(request_id: str) -> None:
    try:
        size = len(request_id.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the request id cannot be UTF-8 (character {error.start}: {error.reason}); correct it", input="request_id"
        ) from error
    if not 0 < size <= _MOST_ID_BYTES:
        raise InvalidArgumentError(
            f"the request id has {len(request_id)} characters, and must have from 1 to {_MOST_ID_BYTES} bytes",
            input="request_id",
        )


def _is_address(url: str) -> bool:
    """Whether it names host and port, or a Unix socket. gRPC would take port 443, or the port modulo 65536."""
    if url.startswith(("unix:", "unix-abstract:")):
        return True
    port = _PORT.search(url)
    return port is not None and not _WEB_ADDRESS.match(url) and 0 < int(port[1]) <= _LAST_PORT


def _checked(urls: tuple[str, ...]) -> tuple[str, ...]:
    for url in urls:
        if not _is_address(url):
            raise InvalidArgumentError(
                f"the address is {url!r}, and must be host:port of the server's gRPC port, such as {DEFAULT_URL}",
                input="url",
                value=url,
            )
    if not urls:
        raise InvalidArgumentError(
            f"no address is given; give host:port of a server, such as {DEFAULT_URL}", input="url"
        )
    return tuple(dict.fromkeys(urls))
