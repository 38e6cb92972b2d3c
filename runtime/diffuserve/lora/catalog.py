"""Which LoRAs a checkpoint can be asked with: names for lists, told by the files' headers.

A header of some kilobytes has the names and shapes of all layers, so no file is read whole. What only the numbers tell,
such as a NaN, is found when a request names the file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from diffuserve.lora.folder import CheckpointLoras, LoraFolder
from diffuserve.named_files import NamedFiles, Seen, seen

__all__ = ["MOST_LOOKED_AT", "MOST_NAMES", "LoraCatalog"]

MOST_NAMES: Final = 256
MOST_LOOKED_AT: Final = 1024
_FRESH_S: Final = 2.0

_log: Final = logging.getLogger(__name__)


class LoraCatalog:
    """The names of one checkpoint. Safe to call from several threads.

    `folder` has the files, and `loras` says which of them fit.
    """

    def __init__(
        self,
        checkpoint: str,
        folder: LoraFolder,
        loras: CheckpointLoras,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoint, self._folder, self._loras = checkpoint, folder, loras
        self._verdicts: dict[Path, tuple[Seen, str | None]] = {}
        self._names, self._looked_at, self._left = tuple[str, ...](), 0, 0
        self._fresh_until = 0.0
        self._clock, self._lock = clock, threading.Lock()

    def told(self, until: float) -> dict[str, Any]:
        """`loras`, in the words of a request and in the order of the alphabet, and how many files were not looked at.

        One that needs more than the built rank reads `name:truncate`. No new file is looked at once the clock says
        `until`, or there are enough; what is told is at most two seconds old.
        """
        if not self._loras.rank:
            return {"loras": (), "loras_not_looked_at": 0}
        with self._lock:
            if self._clock() >= self._fresh_until:
                self._look(until)
            return {"loras": self._names, "loras_not_looked_at": self._left}

    def _look(self, until: float) -> None:
        files = sorted(self._folder.paths(self._checkpoint).items())
        names, verdicts, looked_at, in_time = list[str](), dict[Path, tuple[Seen, str | None]](), 0, True
        for _, paths in files[:MOST_LOOKED_AT]:
            in_time = self._clock() < until
            if not in_time or len(names) == MOST_NAMES:
                break
            looked_at += 1
            try:
                path = NamedFiles.chosen(paths)
                found = seen(path.stat())
            except (OSError, ValueError):
                continue
            known = self._verdicts.get(path)
            name = known[1] if known is not None and known[0] == found else self._verdict(path)
            verdicts[path] = found, name
            if name is not None:
                names.append(name)
        self._verdicts = verdicts if in_time else {**self._verdicts, **verdicts}
        if in_time or looked_at > self._looked_at:
            self._names, self._looked_at, self._left = tuple(names), looked_at, len(files) - looked_at
        if in_time:
            self._fresh_until = self._clock() + _FRESH_S

    def _verdict(self, path: Path) -> str | None:
        """How a request names the file; None where it cannot be used."""
        try:
            rank = self._loras.required_rank(self._folder.header(path))
        except (OSError, ValueError):
            return None
        except Exception:  # one file of many, with whatever somebody wrote into it
            _log.exception("%s is left out of the LoRAs", path)
            return None
        return path.stem if rank <= self._loras.rank else f"{path.stem}:truncate"
