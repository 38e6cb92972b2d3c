"""A component model that makes each engine call a second time, and notes how long that took.

The second call is the bare engine's: the same session, inputs and moment, with nothing between. Machines whose speed
wanders by a fifth within seconds allow no other comparison of two things that differ by a tenth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffuserve.onnx_component import OnnxComponentModel

__all__ = ["TwiceModel"]


class TwiceModel(OnnxComponentModel):
    """Writes a line for each call into `twice.jsonl`: when its second run began (monotonic clock), and its seconds."""

    def initialize(self, args: Mapping[str, str]) -> None:
        super().initialize(args)
        self.session = _Twice(self.session, Path(args["model_repository"]) / "twice.jsonl")


class _Twice:
    def __init__(self, session: Any, file: Path) -> None:
        self._session, self._file = session, file.open("w", encoding="utf-8", buffering=1)

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> Any:
        outputs = self._session.run(names, feed)
        started = time.monotonic()
        self._session.run(names, feed)
        self._file.write(json.dumps([started, time.monotonic() - started]) + "\n")
        return outputs
