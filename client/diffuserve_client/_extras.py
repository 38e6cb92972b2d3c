"""What only some commands need is in extras of the distribution, and imported when such a command runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from diffuserve.errors import UnsupportedError

__all__ = ["extra", "require"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what the extra `name` installs.

        with extra("tools"):
            import imageio.v3

    Raises UnsupportedError, which says what to install, where something of it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this needs {error.name}, which is not installed; pip install 'diffuserve[{name}]'", extra=name
        ) from error


def require(name: str, *modules: str) -> None:
    """Find out now whether what the extra `name` installs is there, where it is used only after long work.

    Raises UnsupportedError as `extra` does.
    """
    with extra(name):
        for module in modules:
            importlib.import_module(module)
