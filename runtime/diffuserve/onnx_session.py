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
    # Threads may spin within a run, where the next operator comes at once, and must not between runs: other components,
    # the loop and Triton itself have the same cores. On two cores a small UNet's call of 16 rows took 28.7 ms without
    # spinning and 24.7 ms so, for the same processor time; the server made 12 % more images a second at 16 requests.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(graph), sess_options=options, providers=["CPUExecutionProvider"])
