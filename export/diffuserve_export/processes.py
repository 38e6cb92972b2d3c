"""What an export's own processes have in common."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

__all__ = ["end_with_parent", "thrifty_environment"]

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>

# glibc gives freed blocks of this many bytes back to the system at once. Left alone it begins with 128 kB and goes up
# to 32 MB, more than most weights have: freed copies of them stayed, and an engine of 1.3 GB took 5.7 GB to build
# instead of 4.7.
_RETURNED_AT_ONCE: Final = 1_000_000


def thrifty_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, for a process that holds many copies of weights for a while."""
    limit = str(_RETURNED_AT_ONCE)
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": limit, "MALLOC_TRIM_THRESHOLD_": limit, **changes}


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process `parent`, ends. Linux has this, others do not.

    An export that is killed would else leave a builder that goes on for minutes and holds gigabytes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be asked for
            os.kill(os.getpid(), signal.SIGKILL)
