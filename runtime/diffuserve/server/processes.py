"""The processes of one tritonserver, as /proc shows them.

Triton does not tell when the process of a Python model is gone: it goes on saying that the model is ready.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ModelProcess", "members"]

_PROC: Final = Path("/proc")
_DEAD: Final = frozenset("ZXx")


@dataclass(frozen=True)
class _Stat:
    """What /proc/<pid>/stat says: the state's letter, the process group, and the start, which tells a reused pid."""

    state: str
    group: int
    started: str


def _stat(pid: int) -> _Stat | None:
    """None where there is no such process, or only what is left of one until its parent asks for its exit code."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses itself.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    stat = _Stat(fields[0], int(fields[2]), fields[19])
    return None if stat.state in _DEAD else stat


def members(group: int) -> list[int]:
    """The pids of a process group that are not dead."""
    pids = (int(path.name) for path in _PROC.glob("[0-9]*"))
    return [pid for pid in pids if (stat := _stat(pid)) is not None and stat.group == group]


class ModelProcess:
    """The Python backend's process of one model, among those of a tritonserver's process group."""

    def __init__(self, group: int, model: str) -> None:
        self._group = group
        # Its arguments end with the instance's name, such as diffusion_0_0.
        self._instance = re.compile(rf"{re.escape(model)}_\d+(_\d+)?")
        self._pid, self._started = 0, ""

    @property
    def was_seen(self) -> bool:
        return bool(self._pid)

    def is_gone(self) -> bool:
        """Whether it was seen before, and is no more. A new one after a new load of the model counts as the same."""
        known = bool(self._pid)
        if known and (stat := _stat(self._pid)) is not None and stat.started == self._started:
            return False
        for pid in members(self._group):
            stat = _stat(pid)
            if stat is not None and self._is_instance(pid):
                self._pid, self._started = pid, stat.started
                return False
        return known

    def _is_instance(self, pid: int) -> bool:
        try:
            arguments = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return False
        return "python_backend_stub" in arguments[0] and any(map(self._instance.fullmatch, arguments))
