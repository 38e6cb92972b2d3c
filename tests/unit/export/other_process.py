"""What tests have done in the process that makes graphs, without torch: `python other_process.py WHAT PID`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from diffuserve_export import CheckpointError, graph_process
from diffuserve_export.report import Report


def is_killed(plan: Any, component: str, path: Path, report: Report) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def says_what_it_cannot_send(plan: Any, component: str, path: Path, report: Report) -> Any:
    return threading.Lock()


def lacks_weights(plan: Any, component: str, path: Path, report: Report) -> Any:
    print("nothing for the pipe")  # noqa: T201
    report.note("it looks at the weights")
    raise CheckpointError("the unet of x lacks weights")


def has_no_room(plan: Any, component: str, path: Path, report: Report) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "model.onnx")


def ends_altogether(plan: Any, component: str, path: Path, report: Report) -> Any:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


if __name__ == "__main__":
    graph_process.serve(globals()[sys.argv[1]])
