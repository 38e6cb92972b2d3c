"""Figures of records that are known."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from diffuserve_client._bench.figures import Distribution, EtaError, figures_of
from diffuserve_client._bench.load import ClosedLoop, OpenLoop
from diffuserve_client._bench.plot import drawn, pictures_over_time
from diffuserve_client._bench.record import INTERRUPTED, Record, Run
from diffuserve_client._bench.report import Bench


def record(index: int, arrived: float, done: float | None, **parts: Any) -> Record:
    known: dict[str, Any] = {"warm_up": False, "sent": arrived, "asked": {}, "images": 1, "steps": 10} | parts
    return Record(index=index, arrived=arrived, done=done, **known)


def test_a_distribution_is_numpys() -> None:
    values = list(np.random.default_rng(0).gamma(2.0, 1.5, 1001))
    told = Distribution.of([*values, None])
    assert told is not None
    assert (told.count, told.max) == (1001, max(values))
    assert told.mean == pytest.approx(np.mean(values))
    for share in (50, 90, 95, 99):
        assert getattr(told, f"p{share}") == pytest.approx(np.percentile(values, share))


def test_a_distribution_of_a_known_sample() -> None:
    """0 to 100: every percentile is its own number, whoever computes it."""
    assert Distribution.of([float(value) for value in range(100, -1, -1)]) == Distribution(101, 50, 50, 90, 95, 99, 100)
    assert Distribution.of([2.0]) == Distribution(1, 2, 2, 2, 2, 2, 2)
    assert Distribution.of([None, None]) is None


def test_the_window_counts_what_was_done_in_it() -> None:
    run = Run(
        ClosedLoop(2),
        begin=1.0,
        end=3.0,
        interrupted=False,
        records=[
            record(0, 0.0, 0.9, warm_up=True),
            record(1, 0.0, 1.5, warm_up=True, images=4),  # under way when the window began
            record(2, 1.0, 2.5, images=2, steps=20),
            record(3, 1.5, 2.6, error="queue_full", images=1),
            record(4, 2.0, 3.5),  # done after the window
            record(5, 2.9, None, error=INTERRUPTED, images=0),
        ],
    )
    told = figures_of(run)
    assert (told.seconds, told.requests, told.done, told.errors, told.interrupted) == (2.0, 4, 2, {"queue_full": 1}, 1)
    assert (told.images, told.images_per_s, told.image_steps_per_s) == (6, 3.0, (4 * 10 + 2 * 20) / 2)
    assert told.latency is not None
    assert (told.latency.count, told.latency.mean) == (2, 1.5)


def test_the_forecasts_error_is_a_share_of_what_came() -> None:
    served = [record(i, 0.0, 9.0, eta_s=eta, served_s=1.0) for i, eta in enumerate((0.5, 1.5, 2.0))]
    without = [record(3, 0.0, 9.0, served_s=1.0), record(4, 0.0, 9.0, eta_s=7.0, served_s=1.0, error="internal")]
    told = EtaError.of([*served, *without])
    assert told is not None
    assert (told.count, told.p50, told.bias) == (3, 0.5, 0.5)
    assert told.p90 == pytest.approx(0.9)
    assert EtaError.of(without) is None


def test_nothing_measured_is_no_error() -> None:
    told = figures_of(Run(OpenLoop(1.0), 0.0, 0.0, True, []), deadline_s=1.0)
    assert (told.images_per_s, told.latency, told.deadline_met) == (0.0, None, None)


def made() -> list[Run]:
    """Two runs of 40 requests, of which every tenth fails."""
    return [
        Run(
            ClosedLoop(at_once),
            begin=0.5,
            end=4.5,
            interrupted=False,
            records=[record(i, i / 10, i / 10 + at_once, error="deadline" if i % 10 == 9 else None) for i in range(40)],
        )
        for at_once in (1, 2)
    ]


def test_the_json_holds_what_its_figures_are_computed_from() -> None:
    told = json.loads(Bench({"urls": 1}, 1.5, made()).as_json())
    assert (told["format"], told["urls"], len(told["runs"])) == (1, 1, 2)
    for run in told["runs"]:
        latencies = [one["done"] - one["arrived"] for one in run["records"] if one["error"] is None]
        assert run["figures"]["latency"]["p90"] == pytest.approx(np.quantile(latencies, 0.9))
        assert run["figures"]["errors"] == {"deadline": 4}
    assert [run["figures"]["deadline_met"] for run in told["runs"]] == [0.9, 0.0]


def test_tables_fit_a_terminal() -> None:
    text = io.StringIO()
    Bench({}, 1.5, made()).print(Console(file=text, width=80))
    assert "…" not in text.getvalue()
    for words in ("closed loop, 2 at once, 4.0 s", "36 of 40 requests done; 4 deadline", "90.0% within the deadline"):
        assert words in text.getvalue()


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".SVG", b"<?xml")])
def test_the_plot_is_a_picture_and_the_same_for_the_same_figures(suffix: str, begins: bytes) -> None:
    first, second = (drawn(made(), suffix, "a title") for _ in range(2))
    assert first.startswith(begins)
    assert first == second
    assert drawn(made()[:1], suffix, "a title") != first


def test_the_timeline_holds_every_picture() -> None:
    (run, _) = made()
    edges, rates = pictures_over_time(run)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(38 / 10 + 1)
    assert sum(
        rate * (end - start) for rate, start, end in zip(rates, edges, edges[1:], strict=False)
    ) == pytest.approx(36)
    assert pictures_over_time(Run(OpenLoop(1.0), 0.0, 0.0, True, [])) == ([0.0, 1.0], [0.0])
