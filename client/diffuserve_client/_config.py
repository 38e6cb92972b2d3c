"""The command's configuration file: TOML, with the keys of the connection options.

    url = ["gpu1:8001", "gpu2:8001"]
    timeout = 120
    token = "..."

It is `config.toml` in the user's application folder, or what DIFFUSERVE_CONFIG names.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import typer

from diffuserve.errors import InvalidArgumentError
from diffuserve_client._exits import complain

__all__ = ["CONFIG_KEYS", "config_path", "read_config"]

_ENVIRONMENT: Final = "DIFFUSERVE_CONFIG"
_MOST_BYTES: Final = 1 << 20


def _texts(value: Any) -> list[str] | None:
    given = [value] if isinstance(value, str) else value
    return given if isinstance(given, list) and given and all(isinstance(one, str) for one in given) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


#: What each key must be, and what makes it so; None where it is not.
CONFIG_KEYS: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "url": ("a text, or a list of texts", _texts),
    "timeout": ("a number of seconds", _number),
    "stall": ("a number of seconds", _number),
    "retries": ("a whole number", _whole),
    "token": ("a text", _text),
    "tls": ("true or false", _flag),
    "tls_ca": ("a file's name", _text),
    "tls_cert": ("a file's name", _text),
    "tls_key": ("a file's name", _text),
    "tls_server_name": ("a text", _text),
}
_FILES: Final = ("tls_ca", "tls_cert", "tls_key")


def config_path() -> Path:
    """Where the file is, or would be."""
    named = os.environ.get(_ENVIRONMENT)
    return Path(named) if named else Path(typer.get_app_dir("diffuserve")) / "config.toml"


def read_config() -> dict[str, Any]:
    """The file's values by their keys; nothing where there is no file. Names of files are beside it, unless absolute.

    Warns on stderr of a token that others can read. Raises InvalidArgumentError for a file that cannot be meant, and
    where DIFFUSERVE_CONFIG names none.
    """
    path = config_path()
    try:
        with path.open("rb") as file:
            content, mode = file.read(_MOST_BYTES + 1), os.fstat(file.fileno()).st_mode
    except FileNotFoundError as error:
        if not os.environ.get(_ENVIRONMENT):
            return {}
        raise _refused(
            path, f"there is none, and {_ENVIRONMENT} names it; write it, or unset {_ENVIRONMENT}"
        ) from error
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror}; let {_ENVIRONMENT} name another") from error
    if len(content) > _MOST_BYTES:
        raise _refused(path, f"it has more than {_MOST_BYTES} bytes; let {_ENVIRONMENT} name another")
    try:
        values = tomllib.loads(content.decode())
    except ValueError as error:  # of UTF-8 as of TOML
        raise _refused(path, f"{error}; correct it") from error
    checked = {key: _checked(path, key, value) for key, value in values.items()}
    if "token" in checked and stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH) and os.name == "posix":
        complain(f"warning: {path} holds a token, and others on this machine can read it; chmod 600 it")
    return checked


def _checked(path: Path, key: str, value: Any) -> Any:
    if key not in CONFIG_KEYS:
        raise _refused(path, f"unknown key {key[:64]!r}; known are {', '.join(CONFIG_KEYS)}")
    meant, read = CONFIG_KEYS[key]
    checked = read(value)
    if checked is None:
        shown = "" if key == "token" else f", and is {str(value)[:64]!r}"
        raise _refused(path, f"{key} must be {meant}{shown}; correct it")
    return str(path.parent / Path(checked).expanduser()) if key in _FILES else checked


def _refused(path: Path, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the configuration {path}: {problem}", input="config", value=str(path))
