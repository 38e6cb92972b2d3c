from __future__ import annotations

import logging
import threading
from collections import defaultdict
from typing import Any

import pytest

from diffuserve.engine import Group
from diffuserve.metrics import METRICS, BackgroundRegistry, Metric, MetricsTelemetry

Labels = tuple[str, ...]


class Recorded:
    """A registry that keeps every update."""

    def __init__(self) -> None:
        self.declared: list[tuple[str, Labels]] = []
        self.values: dict[tuple[str, Labels], list[float]] = defaultdict(list)
        self.threads: set[int] = set()

    def declare(self, metric: Metric, labels: Labels) -> None:
        self.declared.append((metric.name, labels))

    def update(self, metric: Metric, labels: Labels, value: float) -> None:
        self.threads.add(threading.get_ident())
        self.values[metric.name, labels].append(value)


def test_the_table_keeps_to_prometheus_rules() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("diffuserve_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.bounds) == (metric.kind == "histogram"), metric.name
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert set(metric.labels) <= {"checkpoint", "outcome", "code"}, "a label must have few values"


def test_every_series_is_there_before_its_first_event() -> None:
    registry = Recorded()
    MetricsTelemetry(registry, ["a", "b"])
    assert {name for name, _ in registry.declared} == {metric.name for metric in METRICS}
    assert len(set(registry.declared)) == len(registry.declared)
    assert ("diffuserve_requests_ended_total", ("b", "component_failed")) in registry.declared
    assert ("diffuserve_requests_refused_total", ("queue_full",)) in registry.declared
    assert ("diffuserve_requests_active", ()) in registry.declared
    assert not registry.values


def test_each_call_moves_its_metrics() -> None:
    registry = Recorded()
    telemetry = MetricsTelemetry(registry, ["a", "b"])
    telemetry.refused("deadline")
    telemetry.accepted("1", "a", 3.0)
    telemetry.joined("a", 0.25)
    telemetry.stepped(Group("b", 64, 64), 8, 0.5, 0.4)
    telemetry.load(3, 5)
    telemetry.ended("1", "a", "done", 3.0, 2.0)
    telemetry.ended("2", "a", "cancelled", 3.0, 1.0)
    telemetry.ended("3", "b", "component_failed", 3.0, 1.0)
    assert dict(registry.values) == {
        ("diffuserve_requests_refused_total", ("deadline",)): [1],
        ("diffuserve_requests_accepted_total", ("a",)): [1],
        ("diffuserve_join_wait_seconds", ("a",)): [0.25],
        ("diffuserve_step_rows", ("b",)): [8],
        ("diffuserve_step_seconds", ("b",)): [0.5],
        ("diffuserve_engine_seconds_total", ("b",)): [0.4],
        ("diffuserve_requests_waiting", ()): [3],
        ("diffuserve_requests_active", ()): [5],
        ("diffuserve_requests_ended_total", ("a", "done")): [1],
        ("diffuserve_request_seconds", ("a",)): [2.0],
        ("diffuserve_eta_error_ratio", ("a",)): [0.5],
        ("diffuserve_requests_ended_total", ("a", "cancelled")): [1],
        ("diffuserve_requests_cancelled_total", ("a",)): [1],
        ("diffuserve_requests_ended_total", ("b", "component_failed")): [1],
    }


def test_a_name_that_is_not_deployed_makes_no_series_of_its_own() -> None:
    registry = Recorded()
    telemetry = MetricsTelemetry(registry, ["a"])
    for i in range(50):
        telemetry.accepted("1", f"free text {i}", 1.0)
        telemetry.refused(f"code {i}")
    assert set(registry.values) == {
        ("diffuserve_requests_accepted_total", ("other",)),
        ("diffuserve_requests_refused_total", ("other",)),
    }


def test_updates_are_passed_on_by_another_thread_in_fewer_calls() -> None:
    registry = Recorded()
    background = BackgroundRegistry(registry, seconds=60)
    telemetry = MetricsTelemetry(background, ["a"])
    for i in range(10):
        telemetry.accepted("1", "a", 1.0)
        telemetry.load(i, 2 * i)
        telemetry.stepped(Group("a", 64, 64), i, 0.5, 0.25)
    assert not registry.values
    background.close()
    assert threading.get_ident() not in registry.threads
    assert registry.values["diffuserve_requests_accepted_total", ("a",)] == [10]
    assert registry.values["diffuserve_engine_seconds_total", ("a",)] == [2.5]
    assert registry.values["diffuserve_requests_active", ()] == [18]
    assert registry.values["diffuserve_step_rows", ("a",)] == list(range(10))


def test_updates_arrive_while_it_is_open() -> None:
    registry = Recorded()
    arrived = threading.Event()

    class Told(Recorded):
        def update(self, *update: Any) -> None:
            registry.update(*update)
            arrived.set()

    background = BackgroundRegistry(Told(), seconds=0.01)
    MetricsTelemetry(background, ["a"]).load(1, 2)
    assert arrived.wait(10)
    background.close()
    assert registry.values["diffuserve_requests_active", ()] == [2]


def test_a_registry_that_fails_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    seen, again = list[float](), threading.Event()

    class Failing(Recorded):
        def update(self, metric: Metric, labels: Labels, value: float) -> None:
            seen.append(value)
            if len(seen) >= 3:
                again.set()
            raise OSError("the server is gone")

    background = BackgroundRegistry(Failing(), seconds=0.01)
    telemetry = MetricsTelemetry(background, ["a"])
    with caplog.at_level(logging.ERROR):
        while not again.wait(0.02):
            telemetry.refused("deadline")
        background.close()
    assert len([record for record in caplog.records if "metrics cannot be updated" in record.message]) == 1
