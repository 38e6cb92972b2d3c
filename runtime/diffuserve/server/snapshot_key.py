"""The key that snapshots are signed with: the same for all servers that hand requests over to each other."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from diffuserve.server.errors import ServerSetupError
from diffuserve.server.options import ServerOptions

__all__ = ["SNAPSHOT_KEY_FILE", "with_snapshot_key"]

SNAPSHOT_KEY_FILE: Final = "snapshot.key"
_VARIABLE: Final = "DIFFUSERVE_SNAPSHOT_KEY"
_SHORTEST: Final = 16

_LOG: Final = logging.getLogger(__name__)


def with_snapshot_key(options: ServerOptions) -> ServerOptions:
    """The options with the key in the server's environment.

    It is $DIFFUSERVE_SNAPSHOT_KEY, or what `snapshot.key` in the deployment's folder holds, which is made where it is
    not there. Where that folder cannot be written, a key for this start alone. Raises ServerSetupError for a key that
    cannot be read or is too short.
    """
    file = options.deployment / SNAPSHOT_KEY_FILE
    key = os.environ.get(_VARIABLE) or _read(file) or _made(file)
    if len(key) < _SHORTEST:
        raise ServerSetupError(
            f"the snapshots' key has {len(key)} characters, and needs {_SHORTEST}: give a longer {_VARIABLE}, or "
            f"remove {file} to have one made"
        )
    return replace(options, environment={**options.environment, _VARIABLE: key})


def _read(file: Path) -> str | None:
    """The key in the file, or None where there is no file."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ServerSetupError(
            f"{file} cannot be read as a key ({error}): let this user read it, give {_VARIABLE}, or remove it to have "
            "one made"
        ) from error


def _made(file: Path) -> str:
    key = secrets.token_hex(32)
    try:
        # Written whole under another name (readable by its owner alone), so that nobody reads half of it.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".key-") as new:
            new.write(key)
            new.flush()
            os.fsync(new.fileno())
            os.link(new.name, file)
    except FileNotFoundError:  # no deployment: the start says so
        pass
    except FileExistsError:  # another server was first
        return _read(file) or ""
    except OSError as error:
        _LOG.warning(
            "%s cannot be written (%s): snapshots of this start can be resumed by this start alone; give %s to all "
            "servers that hand over to each other",
            file,
            error.strerror,
            _VARIABLE,
        )
    return key
