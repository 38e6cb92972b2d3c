"""Metrics that Triton publishes."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from diffuserve.metrics import Metric

__all__ = ["TritonMetrics"]


class TritonMetrics:
    """A registry whose series are at the server's metrics port.

    Each call crosses to the server's process, in about 20 microseconds, and gives up the interpreter's lock
    meanwhile, which takes milliseconds to get back while another thread computes: not for the stepping thread.
    """

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()

    def declare(self, metric: Metric, labels: tuple[str, ...]) -> None:
        self._one(metric, labels)

    def update(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        series = self._one(metric, labels)
        act = {"counter": "increment", "gauge": "set", "histogram": "observe"}[metric.kind]
        getattr(series, act)(value)

    def _one(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        series = self._series.get((metric.name, labels))
        return self._made(metric, labels) if series is None else series

    def _made(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        with self._lock:  # a checkpoint that is new is declared by another thread than that which updates
            if (metric.name, labels) in self._series:
                return self._series[metric.name, labels]
            family = self._families.get(metric.name)
            if family is None:
                kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
                family = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
                self._families[metric.name] = family
            options = {"buckets": list(metric.bounds)} if metric.kind == "histogram" else {}
            series = family.Metric(labels=dict(zip(metric.labels, labels, strict=True)), **options)
            self._series[metric.name, labels] = series
        return series
