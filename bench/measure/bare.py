"""The deployment's ONNX graphs in plain sessions, to replay the calls that a server made of its engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffuserve.manifest import Deployment
from diffuserve.onnx_session import open_session

__all__ = ["BareEngines", "Call"]

Call = dict[str, Any]


class BareEngines:
    """The first checkpoint's graphs, opened as the component models open them; threads of 0 are one for each core."""

    def __init__(self, deployment: Deployment, threads: int = 0) -> None:
        self._sessions = {}
        manifest = deployment.manifest(deployment.checkpoints[0])
        for component in manifest.components.values():
            graph = deployment.models / component.model / "1" / "model.onnx"
            self._sessions[component.model] = open_session(graph, threads)

    def side_by_side(self, calls: Sequence[Call]) -> float:
        """Seconds of all the calls, on inputs of the same shapes; one lane a model, as Triton has one instance."""
        lanes: dict[str, list[Call]] = {}
        for call in calls:
            lanes.setdefault(call["model"], []).append(call)
        rng = np.random.default_rng(0)
        feeds = [[(call["model"], self._inputs(call, rng)) for call in lane] for lane in lanes.values()]

        def run(lane: list[tuple[str, dict[str, Any]]]) -> None:
            for model, feed in lane:
                self._sessions[model].run(None, feed)

        started = time.perf_counter()
        with ThreadPoolExecutor(max(1, len(feeds))) as pool:
            list(pool.map(run, feeds))
        return time.perf_counter() - started

    def one_after_another(self, calls: Sequence[Call]) -> float:
        """Seconds of all the calls in the order in which they began, on inputs of the same shapes."""
        rng = np.random.default_rng(0)
        ordered = sorted(calls, key=lambda call: call["started"])
        feeds = [(self._sessions[call["model"]], self._inputs(call, rng)) for call in ordered]
        started = time.perf_counter()
        for session, feed in feeds:
            session.run(None, feed)
        return time.perf_counter() - started

    def _inputs(self, call: Call, rng: np.random.Generator) -> dict[str, Any]:
        types = {one.name: one.type for one in self._sessions[call["model"]].get_inputs()}
        feed: dict[str, Any] = {}
        for name, shape in call["shapes"].items():
            if types[name] == "tensor(float)":
                feed[name] = rng.standard_normal(shape, dtype=np.float32)
            else:
                integer = np.int64 if types[name] == "tensor(int64)" else np.int32
                feed[name] = np.full(shape, 320, dtype=integer)
        return feed
