"""Deployments to and from object storage, content-addressed and checked both ways. Loads no torch, and fsspec late."""

from diffuserve.repository.errors import DamagedError, RepositoryError, StorageError
from diffuserve.repository.progress import Progress
from diffuserve.repository.pull import Pulled, pull
from diffuserve.repository.push import Pushed, push
from diffuserve.repository.store import MAX_JOBS
from diffuserve.repository.verify import Listing, Verified, list_versions, verify_folder, verify_store

__all__ = [
    "MAX_JOBS",
    "DamagedError",
    "Listing",
    "Progress",
    "Pulled",
    "Pushed",
    "RepositoryError",
    "StorageError",
    "Verified",
    "list_versions",
    "pull",
    "push",
    "verify_folder",
    "verify_store",
]
