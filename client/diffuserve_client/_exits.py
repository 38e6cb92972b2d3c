"""From errors to one line on stderr and the command's exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from diffuserve.errors import (
    DiffuserveError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from diffuserve_client._errors import ConnectionFailedError

__all__ = ["EXIT_CODES_HELP", "EXIT_INTERRUPTED", "complain", "errors_as_exit_codes", "exit_code", "tell_of_retries"]

EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done; 1 any other failure; 2 a bad value or usage, or something that the server does not have; "
    "3 the server cannot be reached; 4 the deadline passed, or the server is busy or shutting down; 130 Ctrl-C."
)
_EXIT_CODES: Final[tuple[tuple[type[DiffuserveError], int], ...]] = (
    (InvalidArgumentError, 2),
    (NotFoundError, 2),
    (UnsupportedError, 2),
    (ConnectionFailedError, 3),
    (UnavailableError, 4),
)
EXIT_INTERRUPTED: Final = 130


def exit_code(error: DiffuserveError) -> int:
    """What the command exits with for an error."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    try:
        yield
    except DiffuserveError as error:
        complain(error.message)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        complain("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from error


def complain(message: str) -> None:
    # A server's words may hold what a terminal obeys.
    shown = "".join(one if one.isprintable() else "?" for one in " ".join(message.split()))
    typer.echo(f"diffuserve: {shown}", err=True)


class _Notices(logging.Handler):
    """Says what the library logs where somebody looks; elsewhere stderr has the error alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if _is_watched():
            complain(record.getMessage())


def _is_watched() -> bool:
    return sys.stderr.isatty()


def tell_of_retries() -> None:
    """Let a person know why nothing comes while the client tries again."""
    log = logging.getLogger("diffuserve_client")
    if not any(isinstance(one, _Notices) for one in log.handlers):
        log.addHandler(_Notices())
        log.setLevel(logging.INFO)
        log.propagate = False
