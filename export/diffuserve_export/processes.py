"""What an export's own processes have in common."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process `parent`, ends. Linux has this, others do not.

    An export that is killed would else leave a builder that goes on for minutes and holds gigabytes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be asked for
            os.kill(os.getpid(), signal.SIGKILL)
