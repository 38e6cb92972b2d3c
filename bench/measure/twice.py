"""A component model that makes each engine call a second time, and notes how long that took.

The second call is the bare engine's: the same session, inputs and moment, with nothing between. Machines whose speed
wanders by a fifth within seconds allow no other comparison of two things that differ by a tenth.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffuserve.onnx_component import OnnxComponentModel

__all__ = ["TwiceModel"]


class TwiceModel(OnnxComponentModel):
    """Writes a line for each call into `twice.jsonl`: when it began (monotonic clock), seconds of its first run and of
    its second.

    All models of a deployment take turns: one engine computes at a time, so that the calls one after another are what
    the wall time is compared with.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        super().initialize(args)
        self.session = _Twice(self.session, Path(args["model_repository"]))


class _Twice:
    def __init__(self, session: Any, folder: Path) -> None:
        self._session = session
        self._file = (folder / "twice.jsonl").open("w", encoding="utf-8", buffering=1)
        self._turn = (folder.parent / "turn.lock").open("w")

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> Any:
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            began = time.monotonic()
            outputs = self._session.run(names, feed)
            again = time.monotonic()
            self._session.run(names, feed)
            ended = time.monotonic()
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._file.write(json.dumps([began, again - began, ended - again]) + "\n")
        return outputs
