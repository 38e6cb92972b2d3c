"""How a graph is opened in ONNX Runtime on the CPU, for the component models and for benches beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

__all__ = ["open_session"]


def open_session(graph: Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` with `threads` threads, 0 being one for each core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads must not spin: other components, the loop and Triton itself run on the same cores. A small UNet's
    # call of two rows took 17 ms of CPU time without spinning and 27 ms with it on two busy cores; on two idle
    # ones spinning answers sooner, 8 ms instead of 10.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(graph), sess_options=options, providers=["CPUExecutionProvider"])
