"""What a running server makes of its deployment's folder: new checkpoints are loaded, the table of aliases is followed.

Two files are watched, `deployment.json` and `rollout.json`, both of which are replaced whole. A file needs no address,
token or running server to be written; it outlives restarts, and one folder may serve several servers. What cannot be
read or loaded changes nothing: the server goes on with what it has, and `status` says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import DiffuserveError
from diffuserve.manifest import Deployment
from diffuserve.registry import CheckpointRegistry
from diffuserve.request import RANDOM_SEED, GenerateRequest
from diffuserve.rollout.table import RolloutTable, check_name, read_table
from diffuserve.spec import device_kind

__all__ = ["LiveRollout"]

#: A server's metrics and its memory grow with each.
MAX_CHECKPOINTS: Final = 256
_POLL_SECONDS: Final = 0.5

_log: Final = logging.getLogger(__name__)

_Seen = tuple[tuple[int, int, int] | None, ...]


class LiveRollout:
    """Follows `root` on a thread of its own until it is closed.

    registry  where checkpoints that were exported later are added
    opened    reads one of them by its name
    prove     returns once one of them was loaded that is in the registry; may take its time, and raises where it cannot
    """

    def __init__(
        self,
        root: Path,
        registry: CheckpointRegistry,
        opened: Callable[[str], Checkpoint],
        prove: Callable[[str], None],
    ) -> None:
        self._root, self._registry, self._opened, self._prove = root, registry, opened, prove
        #: What aliases may name: a checkpoint that was never loaded may turn out not to be loadable.
        self._proven = list(registry)
        self._table, self._digest, self._problem = RolloutTable(), "", ""
        self._loading: str | None = None
        self._failed: dict[str, str] = {}
        self._refused: int | None = None
        self._loader: threading.Thread | None = None
        self._stale = False
        self._closed = threading.Event()
        self._seen = self._signature()
        self._follow()
        self._thread = threading.Thread(target=self._watch, name="rollout", daemon=True)
        self._thread.start()

    def choose(self, request: GenerateRequest, request_id: str) -> tuple[str | None, str | None]:
        """The name of the checkpoint that a request gets, None for the server's default, and the alias it came by.

        Whoever sends a `client_tag` stays with one version, as long as the shares do. Without one, a request with a
        seed is decided by its prompt and seed, so that it makes the same picture again; others by their id.
        """
        if request.client_tag:
            key = f"tag\0{request.client_tag}"
        elif request.seed != RANDOM_SEED:
            key = f"seed\0{request.seed}\0{request.prompt}\0{request.negative_prompt}"
        else:
            key = f"id\0{request_id}"
        return self._table.choose(request.checkpoint, key)

    def status(self) -> dict[str, object]:
        """What requests get, what is not in effect, and why.

        table    the digest of the file that is in effect
        problem  why the file that is there now is not; empty where it is
        refused  where that is the last word on the file that was written then, its mtime in ns: nothing is to be loaded
        """
        table = self._table
        return {
            "table": self._digest,
            "refused": self._refused,
            "problem": self._problem,
            "default": table.default or self._registry.default,
            "aliases": {name: alias.shares() for name, alias in table.aliases.items()},
            "checkpoints": list(self._proven),
            "loading": self._loading,
            "failed": {} if self._stale else dict(self._failed),  # what failed is about to be tried again
        }

    def close(self) -> None:
        """Stop following. A checkpoint that is being loaded is not waited for."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            # Asked first: what is loaded by now is in the answer below.
            settled = self._loader is None and not self._stale
            try:
                if (seen := self._signature()) != self._seen:
                    settled = False
                    self._seen = seen
                    self._stale = True
                    self._follow()
                elif self._problem:
                    self._follow()  # what was missing may be loaded by now
                table = seen[-1]
                self._refused = table[-1] if table and settled and self._problem else None
                if self._stale and self._loader is None:
                    self._failed = {}
                    self._stale = False
                    self._load()
            except Exception:
                _log.exception("the deployment's folder cannot be followed")

    def _signature(self) -> _Seen:
        return tuple(_seen(self._root / name) for name in (Deployment.FILE, RolloutTable.FILE))

    def _follow(self) -> None:
        """Take the table that is there, if it can be."""
        try:
            table, digest = read_table(self._root)
            table.check(self._proven)
        except (OSError, ValueError) as error:
            if self._problem != str(error):
                _log.warning("%s is not in effect: %s", RolloutTable.FILE, error)
            self._problem = str(error)
            return
        if digest != self._digest:
            shares = {name: alias.shares() for name, alias in table.aliases.items()}
            _log.info("rollout", extra={"table": digest, "default": table.default, "aliases": shares})
        self._table, self._digest, self._problem = table, digest, ""

    def _load(self) -> None:
        """Load what was exported since, one after another, on a thread: a decision must not wait for it."""
        self._loader = threading.Thread(target=self._load_new, name="rollout-load", daemon=True)
        self._loader.start()

    def _load_new(self) -> None:
        try:
            while not self._closed.is_set() and (name := self._next()) is not None:
                self._loading = name
                self._load_one(name)
                self._loading = None
        finally:
            self._loading, self._loader = None, None

    def _next(self) -> str | None:
        """An exported checkpoint that the server does not have, and that did not fail since the files changed."""
        try:
            names = Deployment.load(self._root).checkpoints[:MAX_CHECKPOINTS]
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read: %s", self._root / Deployment.FILE, error)
            self._failed = {**self._failed, Deployment.FILE: str(error)}
            return None
        return next((name for name in names if name not in self._proven and name not in self._failed), None)

    def _load_one(self, name: str) -> None:
        try:
            if check_name(name) in self._table.aliases:
                raise ValueError("an alias has this name; export it under another")
            self._registry.add(self._fitting(self._opened(name)))
            try:
                self._prove(name)
            except Exception:
                self._registry.forget(name)
                raise
            self._proven = [*self._proven, name]
            _log.info("checkpoint loaded", extra={"checkpoint": name})
        except Exception as error:
            expected = isinstance(error, OSError | ValueError | DiffuserveError)
            _log.error("checkpoint %r cannot be loaded: %s", name[:80], error, exc_info=None if expected else error)
            self._failed = {**self._failed, name: str(error) or repr(error)}

    def _fitting(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, where it is for the device that the loop runs on. Raises ValueError."""
        target, ours = checkpoint.manifest.target, self._registry[self._registry.default].manifest.target
        if target != ours:
            device_kind([ours, target])
        return checkpoint


def _seen(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
