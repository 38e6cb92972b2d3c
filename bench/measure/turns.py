"""A component model whose engine takes turns with the deployment's other engines."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffuserve.onnx_component import OnnxComponentModel

__all__ = ["TurnsModel"]


class TurnsModel(OnnxComponentModel):
    """One engine computes at a time, so that nothing overlaps and the calls one after another are the bound."""

    def initialize(self, args: Mapping[str, str]) -> None:
        super().initialize(args)
        self.session = _Turns(self.session, Path(args["model_repository"]))


class _Turns:
    def __init__(self, session: Any, folder: Path) -> None:
        self._session, self._turn = session, (folder.parent / "turn.lock").open("w")

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> Any:
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            return self._session.run(names, feed)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
