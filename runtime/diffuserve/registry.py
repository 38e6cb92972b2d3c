"""The checkpoints that a server has: the one place that knows them, and that they may change while it serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import NotFoundError

__all__ = ["CheckpointRegistry"]


class CheckpointRegistry(Mapping[str, Checkpoint]):
    """Checkpoints by name, the default first. Whoever reads sees the old set or the new one, and never waits.

    One that is removed takes no new requests. It is still found by its name, for those of its that are under way;
    hence a name is never given to another: a new version of a checkpoint has a name of its own. Only one that never
    worked may be replaced.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._now: Mapping[str, Checkpoint] = {one.name: one for one in checkpoints}
        self._retired: Mapping[str, Checkpoint] = {}
        self._forgotten: Mapping[str, Checkpoint] = {}
        self._lock = threading.Lock()
        #: Called before one is there for requests, and after it is there no more (False), by the thread that has it so.
        self.listeners: list[Callable[[Checkpoint, bool], None]] = []

    def __getitem__(self, name: str) -> Checkpoint:
        checkpoint = self._now.get(name) or self._retired.get(name)
        return self._forgotten[name] if checkpoint is None else checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self._now

    def __iter__(self) -> Iterator[str]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)

    @property
    def default(self) -> str:
        """The name of the one that a request gets which names none."""
        return next(iter(self._now))

    def find(self, name: str | None) -> Checkpoint:
        """The checkpoint that a request names, or the default. Raises NotFoundError."""
        known = self._now
        checkpoint = known.get(name or next(iter(known)))
        if checkpoint is None:
            raise NotFoundError(
                f"checkpoint {(name or '')[:64]!r} is not deployed; deployed are {', '.join(known)}",
                input="checkpoint",
                deployed=tuple(known),
            )
        return checkpoint

    def add(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint served from now on. Raises ValueError where there is, or was, another of its name."""
        with self._lock:
            name = checkpoint.name
            known = self._now.get(name) or self._retired.get(name)
            if known is not None and known.manifest.key != checkpoint.manifest.key:
                raise ValueError(f"{name} is another export's name here; give the new version a name of its own")
            self._tell(checkpoint, True)
            self._now = {**self._now, name: checkpoint}

    def remove(self, name: str) -> None:
        """Have a checkpoint's new requests refused. Raises KeyError where it is not there, ValueError for the last."""
        with self._lock:
            left = dict(self._now)
            checkpoint = left.pop(name)
            if not left:
                raise ValueError(f"{name} is the only checkpoint, and a server has at least one; add another first")
            self._retired = {**self._retired, name: checkpoint}
            self._now = left
        self._tell(checkpoint, False)

    def forget(self, name: str) -> None:
        """Undo `add` for a checkpoint that turned out not to work. Its name is free for another export."""
        with self._lock:
            left = dict(self._now)
            checkpoint = left.pop(name)
            self._forgotten = {**self._forgotten, name: checkpoint}
            self._now = left
        self._tell(checkpoint, False)

    def make_default(self, name: str) -> None:
        """Have requests that name no checkpoint served by this one. Raises KeyError where it is not there."""
        with self._lock:
            others = {other: one for other, one in self._now.items() if other != name}
            self._now = {name: self._now[name], **others}

    def _tell(self, checkpoint: Checkpoint, is_there: bool) -> None:
        for listener in self.listeners:
            listener(checkpoint, is_there)
