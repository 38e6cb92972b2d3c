"""The errors that only a client can have; the server's are in diffuserve.errors.

DiffuserveError
└── ConnectionFailedError   connection_failed   no server there, or it went away before the request was done
"""

from __future__ import annotations

from diffuserve.errors import DiffuserveError

__all__ = ["ConnectionFailedError"]


class ConnectionFailedError(DiffuserveError):
    """The server could not be reached, or the connection broke. `detail["url"]` says which server."""

    code = "connection_failed"
