"""What can go wrong between the command and a ready server.

ServerStartError          the server did not start: it died, or a model failed to load
└── ServerSetupError      nothing was started: a check of the machine or of the options failed
"""

from __future__ import annotations

__all__ = ["ServerSetupError", "ServerStartError"]


class ServerStartError(RuntimeError):
    """The server process died before it was ready, or a model failed to load."""


class ServerSetupError(ServerStartError):
    """A check before the start failed; the message is one line with the value, the limit and the remedy."""
