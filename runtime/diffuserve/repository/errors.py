"""What can go wrong between a deployment's folder and object storage, beside values that are refused.

DiffuserveError
└── RepositoryError     repository   the folder or the storage cannot be used as it is
    ├── StorageError    storage      the storage cannot be reached, or refuses
    └── DamagedError    damaged      something is there, and is not what it should be
"""

from __future__ import annotations

from diffuserve.errors import DiffuserveError

__all__ = ["DamagedError", "RepositoryError", "StorageError"]


class RepositoryError(DiffuserveError):
    code = "repository"


class StorageError(RepositoryError):
    """The storage cannot be reached, lacks something, or refuses. `detail["url"]` says which."""

    code = "storage"


class DamagedError(RepositoryError):
    """A file, a blob or a manifest is not what its digest says."""

    code = "damaged"
