"""The key that snapshots are signed with: the same for all servers that hand requests over to each other."""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import replace
from typing import Final

from diffuserve.server.errors import ServerSetupError
from diffuserve.server.options import ServerOptions

__all__ = ["SNAPSHOT_KEY_FILE", "with_snapshot_key"]

SNAPSHOT_KEY_FILE: Final = "snapshot.key"
_VARIABLE: Final = "DIFFUSERVE_SNAPSHOT_KEY"
_SHORTEST: Final = 16


def with_snapshot_key(options: ServerOptions) -> ServerOptions:
    """The options with the key in the server's environment.

    It is $DIFFUSERVE_SNAPSHOT_KEY, or what `snapshot.key` in the deployment's folder holds, which is made where it is
    not there. Where that folder cannot be written, a key for this start alone. Raises ServerSetupError for a key that
    is too short.
    """
    key = os.environ.get(_VARIABLE) or _key_of(options)
    if len(key) < _SHORTEST:
        raise ServerSetupError(
            f"the snapshots' key has {len(key)} characters, and needs {_SHORTEST}: give a longer {_VARIABLE}, or "
            f"remove {options.deployment / SNAPSHOT_KEY_FILE} to have one made"
        )
    return replace(options, environment={**options.environment, _VARIABLE: key})


def _key_of(options: ServerOptions) -> str:
    file, key = options.deployment / SNAPSHOT_KEY_FILE, secrets.token_hex(32)
    try:
        # Written whole under another name (readable by its owner alone), so that nobody reads half of it.
        with tempfile.NamedTemporaryFile("w", dir=options.deployment, prefix=".key-") as new:
            new.write(key)
            new.flush()
            os.link(new.name, file)
    except FileExistsError:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        pass
    return key
