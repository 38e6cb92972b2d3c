"""Metrics: one frozen table, and the listener that turns what the engine tells of itself into updates of it.

    MetricsTelemetry -> BackgroundRegistry -> a Registry that publishes (Triton's, in diffuserve.triton_metrics)

Labels hold deployed names and error codes alone, never what a request says.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final, Literal, Protocol

from diffuserve.errors import CancelledError, DiffuserveError
from diffuserve.telemetry import Telemetry

if TYPE_CHECKING:
    from diffuserve.engine import Group

__all__ = ["METRICS", "BackgroundRegistry", "Metric", "MetricsTelemetry", "Registry"]

_log: Final = logging.getLogger(__name__)

DONE: Final = "done"
SUSPENDED: Final = "suspended"  # it ended with a snapshot
OTHER: Final = "other"  # the label of a name that is not deployed: it must not make a new series

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of series. `labels` are label names; `bounds` are a histogram's upper bounds, without +Inf."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)

ACTIVE: Final = Metric("diffuserve_requests_active", "gauge", "Requests that are being stepped")
WAITING: Final = Metric("diffuserve_requests_waiting", "gauge", "Requests that wait for their first step")
ACCEPTED: Final = Metric(
    "diffuserve_requests_accepted_total", "counter", "Requests that were accepted", ("checkpoint",)
)
REFUSED: Final = Metric(
    "diffuserve_requests_refused_total", "counter", "Requests that were not accepted, by error code", ("code",)
)
ENDED: Final = Metric(
    "diffuserve_requests_ended_total",
    "counter",
    "Accepted requests that got their final response: done, suspended (a snapshot), or the code of the error that "
    "ended them",
    ("checkpoint", "outcome"),
)
CANCELLED: Final = Metric(
    "diffuserve_requests_cancelled_total",
    "counter",
    "Accepted requests that the client cancelled or left, or that a shutdown ended",
    ("checkpoint",),
)
REQUEST_SECONDS: Final = Metric(
    "diffuserve_request_seconds",
    "histogram",
    "Seconds from a request's arrival to its last picture",
    ("checkpoint",),
    _REQUEST_SECONDS,
)
JOIN_WAIT: Final = Metric(
    "diffuserve_join_wait_seconds",
    "histogram",
    "Seconds from an image's latents and text being ready to its first UNet call",
    ("checkpoint",),
    _STEP_SECONDS,
)
STEP_ROWS: Final = Metric(
    "diffuserve_step_rows",
    "histogram",
    "Rows of each UNet call, padding included",
    ("checkpoint",),
    (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0),
)
STEP_SECONDS: Final = Metric(
    "diffuserve_step_seconds",
    "histogram",
    "Seconds of each UNet call with the work around it; its _sum is the time spent stepping",
    ("checkpoint",),
    _STEP_SECONDS,
)
ENGINE_SECONDS: Final = Metric(
    "diffuserve_engine_seconds_total",
    "counter",
    "Seconds of the UNet calls that were the engine's own",
    ("checkpoint",),
)
ETA_ERROR: Final = Metric(
    "diffuserve_eta_error_ratio",
    "histogram",
    "How far a finished request's ETA was off: |eta - actual| / actual",
    ("checkpoint",),
    (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
LOADS: Final = Metric(
    "diffuserve_loads_total", "counter", "Loads of a checkpoint's components that went well", ("checkpoint",)
)
LOADS_FAILED: Final = Metric(
    "diffuserve_loads_failed_total", "counter", "Loads of a checkpoint's components that failed", ("checkpoint",)
)
UNLOADS: Final = Metric(
    "diffuserve_unloads_total", "counter", "How often a checkpoint's components left the memory", ("checkpoint",)
)
LOAD_SECONDS: Final = Metric(
    "diffuserve_load_seconds",
    "histogram",
    "Seconds of each load of a checkpoint's components",
    ("checkpoint",),
    (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
RESIDENT: Final = Metric(
    "diffuserve_resident_bytes",
    "gauge",
    "Bytes that a checkpoint's components take in memory, shared ones in each",
    ("checkpoint",),
)
MEMORY: Final = Metric("diffuserve_memory_bytes", "gauge", "Bytes that all components in memory take, shared ones once")

LORA_HITS: Final = Metric(
    "diffuserve_lora_hits_total", "counter", "LoRA files that were held in memory when a request asked for them"
)
LORA_MISSES: Final = Metric(
    "diffuserve_lora_misses_total", "counter", "LoRA files that were read because a request asked for them"
)
LORA_BYTES: Final = Metric("diffuserve_lora_bytes", "gauge", "Bytes of the LoRA files that are held in memory")

METRICS: Final = (
    ACTIVE,
    WAITING,
    ACCEPTED,
    REFUSED,
    ENDED,
    CANCELLED,
    REQUEST_SECONDS,
    JOIN_WAIT,
    STEP_ROWS,
    STEP_SECONDS,
    ENGINE_SECONDS,
    ETA_ERROR,
    LORA_HITS,
    LORA_MISSES,
    LORA_BYTES,
    LOADS,
    LOADS_FAILED,
    UNLOADS,
    LOAD_SECONDS,
    RESIDENT,
    MEMORY,
)


class Registry(Protocol):
    """Keeps series. `labels` are values in the order of the metric's label names."""

    def declare(self, metric: Metric, labels: Labels) -> None:
        """Publish a series before its first update, at zero."""

    def update(self, metric: Metric, labels: Labels, value: float) -> None:
        """Add to a counter, set a gauge, or observe in a histogram."""


class MetricsTelemetry(Telemetry):
    """Updates the table's series. All of them are declared at once: a rate needs the zero before the first event."""

    def __init__(self, registry: Registry, checkpoints: Sequence[str]) -> None:
        self._registry = registry
        self._values = {
            "checkpoint": frozenset(checkpoints),
            "outcome": frozenset((DONE, SUSPENDED, *_error_codes())),
            "code": frozenset(_error_codes()),
        }
        self._declare(self._values)

    def deployed(self, checkpoint: str) -> None:
        known = self._values["checkpoint"]
        if checkpoint not in known:
            self._declare({**self._values, "checkpoint": frozenset([checkpoint])})
            self._values["checkpoint"] = known | {checkpoint}

    def _declare(self, values: Mapping[str, frozenset[str]]) -> None:
        for metric in METRICS:
            for labels in product(*(sorted(values[name]) for name in metric.labels)):
                self._registry.declare(metric, labels)

    def refused(self, code: str) -> None:
        self._update(REFUSED, 1, code)

    def accepted(self, request_id: str, checkpoint: str, eta: float) -> None:  # noqa: ARG002 - the port's signature
        self._update(ACCEPTED, 1, checkpoint)

    def joined(self, checkpoint: str, wait: float) -> None:
        self._update(JOIN_WAIT, wait, checkpoint)

    def stepped(self, group: Group, rows: int, seconds: float, engine: float) -> None:
        self._update(STEP_ROWS, rows, group.checkpoint)
        self._update(STEP_SECONDS, seconds, group.checkpoint)
        self._update(ENGINE_SECONDS, engine, group.checkpoint)

    def ended(self, request_id: str, checkpoint: str, outcome: str, eta: float, seconds: float) -> None:  # noqa: ARG002
        self._update(ENDED, 1, checkpoint, outcome)
        if outcome == CancelledError.code:
            self._update(CANCELLED, 1, checkpoint)
        elif outcome == DONE:
            self._update(REQUEST_SECONDS, seconds, checkpoint)
            if seconds > 0:
                self._update(ETA_ERROR, abs(eta - seconds) / seconds, checkpoint)

    def load(self, waiting: int, active: int) -> None:
        self._update(WAITING, waiting)
        self._update(ACTIVE, active)

    def lora(self, hit: bool, held_bytes: int) -> None:
        self._update(LORA_HITS if hit else LORA_MISSES, 1)
        self._update(LORA_BYTES, held_bytes)

    def loaded(self, checkpoint: str, seconds: float) -> None:
        self._update(LOADS, 1, checkpoint)
        self._update(LOAD_SECONDS, seconds, checkpoint)

    def unloaded(self, checkpoint: str) -> None:
        self._update(UNLOADS, 1, checkpoint)

    def load_failed(self, checkpoint: str) -> None:
        self._update(LOADS_FAILED, 1, checkpoint)

    def resident(self, checkpoints: Mapping[str, int], total: int) -> None:
        for name, size in checkpoints.items():
            self._update(RESIDENT, size, name)
        self._update(MEMORY, total)

    def _update(self, metric: Metric, value: float, *labels: str) -> None:
        known = (
            label if label in self._values[name] else OTHER for name, label in zip(metric.labels, labels, strict=True)
        )
        self._registry.update(metric, tuple(known), value)


def _error_codes() -> tuple[str, ...]:
    def codes(error: type[DiffuserveError]) -> Iterator[str]:
        yield error.code
        for leaf in error.__subclasses__():
            yield from codes(leaf)

    return tuple(sorted(set(codes(DiffuserveError))))


class BackgroundRegistry:
    """A registry that only notes updates, for threads that must not wait, and passes them on from a thread of its own.

    A publishing registry may take its time: an update of Triton's crosses to the server's process. Counters are
    summed and gauges keep their last value before they are passed on. `close` passes on what is left.
    """

    def __init__(self, registry: Registry, seconds: float = 0.5) -> None:
        self._registry, self._seconds = registry, seconds
        self._noted: deque[tuple[Metric, Labels, float]] = deque()
        self._closed = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def declare(self, metric: Metric, labels: Labels) -> None:
        self._registry.declare(metric, labels)

    def update(self, metric: Metric, labels: Labels, value: float) -> None:
        self._noted.append((metric, labels, value))  # one atomic call

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        if not noted:
            return
        try:
            for metric, labels, value in _merged(noted):
                self._registry.update(metric, labels, value)
            self._failing = False
        except Exception:  # pictures matter more than their metrics
            if not self._failing:
                _log.exception("metrics cannot be updated; some are lost")
            self._failing = True


def _merged(noted: Iterable[tuple[Metric, Labels, float]]) -> Iterator[tuple[Metric, Labels, float]]:
    """The same updates in fewer: one for each counter and gauge, all of a histogram's."""
    kept: dict[tuple[Metric, Labels], float] = {}
    for metric, labels, value in noted:
        if metric.kind == "histogram":
            yield metric, labels, value
        else:
            before = kept.get((metric, labels), 0.0) if metric.kind == "counter" else 0.0
            kept[metric, labels] = before + value
    for (metric, labels), value in kept.items():
        yield metric, labels, value
