"""The synchronous client."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from diffuserve.errors import DrainingError, InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._parameters import GenerateParameters, ResumeParameters, request_from
from diffuserve_client._results import GenerateResult, PictureEvent, result_from
from diffuserve_client._timeout import Timeout

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

__all__ = ["DEFAULT_URL", "Client"]

DEFAULT_URL: Final = "localhost:8001"
_WEB_ADDRESS: Final = re.compile(r"(?:https?|grpcs?)://")


class Client:
    """A connection to one server, at host:port of its gRPC port.

    Threads may share it: each request has a stream of its own. It is a context manager; `close` cancels what runs.

    Raises InvalidArgumentError for an address or timeout that cannot be meant.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout: Timeout | float | None = None) -> None:
        """`timeout`: a Timeout, or the seconds that a request may take in all."""
        if not url or _WEB_ADDRESS.match(url):
            raise InvalidArgumentError(
                f"the address is {url!r}, and must be host:port of the server's gRPC port, such as {DEFAULT_URL}",
                input="url",
                value=url,
            )
        # gRPC takes most of a second to import; whoever only reads types or --help should not wait for it.
        from diffuserve_client._connection import Connection

        self.url: Final = url
        self.timeout: Final = Timeout() if timeout is None else Timeout.of(timeout)
        self._connection = Connection(url, self.timeout)

    def generate(
        self,
        prompt: str | GenerateRequest,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> GenerateResult:
        """Make a request's pictures and wait for them.

        The request is a prompt and GenerateRequest's other fields as keywords, or a GenerateRequest alone.
        `on_progress` is called in this thread with each progress event: of every step, unless `progress_every` says
        otherwise; `on_preview` with each preview, whose `image` is small, unless `preview_every` says otherwise. Where
        one raises, and on Ctrl-C, the request is cancelled on the server.

        Raises DiffuserveError; among them ConnectionFailedError, DeadlineError, InvalidArgumentError. A DrainingError
        whose detail has a `snapshot` tells of a server that was shut down meanwhile: `resume` goes on from it, and
        the pictures that were done by then are its detail `images`.
        """
        request = request_from(
            prompt,
            parameters,
            wants_progress=on_progress is not None,
            wants_previews=on_preview is not None,
        )
        return self._wait(request, on_progress, on_preview)

    def resume(
        self,
        snapshot: bytes,
        *,
        on_progress: Callable[[Event], None] | None = None,
        on_preview: Callable[[PictureEvent], None] | None = None,
        **parameters: Unpack[ResumeParameters],
    ) -> GenerateResult:
        """Go on with a request that another server, which was shut down, ended with a snapshot.

        The pictures that were left are made as they would have been there. Raises what `generate` raises;
        InvalidArgumentError for a snapshot of another export, of another release, or signed with another key.
        """
        request = request_from(
            GenerateRequest(prompt="", resume=snapshot, **parameters),
            {},
            wants_progress=on_progress is not None,
            wants_previews=on_preview is not None,
        )
        return self._wait(request, on_progress, on_preview)

    def _wait(
        self,
        request: GenerateRequest,
        on_progress: Callable[[Event], None] | None,
        on_preview: Callable[[PictureEvent], None] | None,
    ) -> GenerateResult:
        images = []
        with closing(self.stream(request)) as events:
            for event in events:
                if event.kind == "image":
                    images.append(event)
                elif event.kind == "snapshot":
                    raise DrainingError(
                        f"the server at {self.url} was shut down before all pictures were done; go on elsewhere with "
                        "Client.resume and this error's detail `snapshot`",
                        snapshot=event.data,
                        images=result_from(request, images).images,
                    )
                elif on_progress is not None and event.kind == "progress":
                    on_progress(event)
                elif on_preview is not None and event.kind == "preview" and isinstance(event, PictureEvent):
                    on_preview(event)
        return result_from(request, images)

    def stream(self, request: GenerateRequest) -> Generator[Event, None, None]:
        """Every event of a request as it comes; those of the kinds `image` and `preview` are PictureEvents.

        The request is sent when the first event is asked for. Closing the iterator cancels it on the server; use
        `contextlib.closing` around a loop that may be left early.

        Raises what `generate` raises.
        """
        from diffuserve_client._exchange import Exchange

        return self._connection.run(Exchange(request, url=self.url, timeout=self.timeout))

    def status(self) -> dict[str, Any]:
        """What the server is doing, and its checkpoints: docs/operations.md says what is in it.

        Raises DiffuserveError; among them ConnectionFailedError.
        """
        from diffuserve_client._exchange import StatusExchange

        with closing(self._connection.run(StatusExchange(url=self.url, timeout=self.timeout))) as events:
            return dict(next(events).info)

    def close(self) -> None:
        """Hang up. Requests that run in other threads raise CancelledError; later ones RuntimeError."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
