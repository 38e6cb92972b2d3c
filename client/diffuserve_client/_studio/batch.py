"""Many requests at once: what came of each, whatever became of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import typer

from diffuserve.errors import CancelledError, DiffuserveError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._exits import complain, exit_code

if TYPE_CHECKING:
    from diffuserve_client._client import Client
    from diffuserve_client._results import GenerateResult

__all__ = ["Batch", "progress_shown", "run_batch"]

_PROGRESS_EVERY: Final = 2  # steps

OnEvent = Callable[[int, Event], None]


@dataclass
class Batch:
    """`outcomes[i]` is what came of request i: its result, or the error that it ended with.

    `interrupted`: Ctrl-C was pressed, and what was not done by then is a CancelledError.
    """

    outcomes: list[GenerateResult | DiffuserveError]
    interrupted: bool = False
    errors: list[DiffuserveError] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = [one for one in self.outcomes if isinstance(one, DiffuserveError)]

    @property
    def results(self) -> list[GenerateResult]:
        """What was made, in the requests' order."""
        return [one for one in self.outcomes if not isinstance(one, DiffuserveError)]

    def raise_if_empty(self) -> None:
        """Where nothing was made: raises KeyboardInterrupt if that is why, else the first error."""
        if len(self.errors) < len(self.outcomes):
            return
        if self.interrupted:
            raise KeyboardInterrupt
        raise self.errors[0]

    def exit_unless_whole(self, names: Sequence[str]) -> None:
        """End the command where something is missing, with one line that says what. `names` are the requests'.

        Raises KeyboardInterrupt where that ended it, typer.Exit with the first error's code.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if not self.errors:
            return
        first = self.errors[0]
        name = names[self.outcomes.index(first)]
        complain(f"{len(self.errors)} of {len(self.outcomes)} pictures failed; the first, {name}: {first.message}")
        raise typer.Exit(exit_code(first))


def run_batch(
    client: Client,
    requests: Sequence[GenerateRequest],
    *,
    concurrency: int,
    on_done: Callable[[int, GenerateResult], None],
    on_event: OnEvent | None = None,
) -> Batch:
    """Make every request's pictures. `on_done` is called with each result as it comes, so that it can be kept.

    A request that fails leaves the others alone; once the server is lost, or on Ctrl-C, what is left is cancelled.
    """
    outcomes: dict[int, GenerateResult | DiffuserveError] = {}
    interrupted = False
    rest: DiffuserveError = CancelledError("not made: interrupted")
    if on_event is not None:
        requests = [replace(one, progress_every=_PROGRESS_EVERY) for one in requests]
    results = client.generate_many(
        requests, concurrency=concurrency, in_order=False, return_errors=True, on_event=on_event
    )
    try:
        with closing(results):
            for outcome in results:
                if isinstance(outcome, DiffuserveError):
                    outcomes[outcome.detail["index"]] = outcome
                    if isinstance(outcome, ConnectionFailedError):
                        rest = outcome
                        break
                else:
                    outcomes[outcome.index] = outcome
                    on_done(outcome.index, outcome)
    except KeyboardInterrupt:
        interrupted = True
    return Batch([outcomes.get(index, rest) for index in range(len(requests))], interrupted)


@contextmanager
def progress_shown(count: int, what: str) -> Iterator[OnEvent | None]:
    """A bar of `count` pictures on stderr, gone when done; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    shares = [0.0] * count  # events come in several threads
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"{count} {what}", total=count)

        def on_event(index: int, event: Event) -> None:
            if event.kind in ("progress", "image"):
                shares[index] = 1.0 if event.kind == "image" else event.step / event.steps
                bars.update(task, completed=sum(shares))

        yield on_event
