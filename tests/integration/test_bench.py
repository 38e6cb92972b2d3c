"""A short load on the real server: its figures, computed again from the raw records."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

MIX = ("--steps", "2,4,6", "--guided-share", "0.5", "--guidance-scale", "7", "--preview-every", "2", "--seed", "5")


@pytest.fixture(scope="module")
def told(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command writes of ten requests at 20 a second, after two that do not count."""
    folder = tmp_path_factory.mktemp("bench")
    load = ("--rate", "20", "--requests", "10", "--warm-up", "2", "--deadline-ms", "60000")
    command = [sys.executable, "-m", "diffuserve_client", "bench", "--url", server.grpc_url, *load, *MIX]
    done = subprocess.run([*command, "--json", "out.json"], capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 of 10 requests done; no errors" in done.stdout
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_the_figures_are_those_of_the_records(told: Any) -> None:
    (run,) = told["runs"]
    figures, records = run["figures"], run["records"]
    measured = records[2:]
    assert [one["warm_up"] for one in records] == [True] * 2 + [False] * 10
    times = {
        "latency": [one["done"] - one["arrived"] for one in measured],
        "queued": [one["queued"] - one["arrived"] for one in measured],
        "queue": [one["queue_s"] for one in measured],
        "first_step": [one["first_step"] - one["arrived"] for one in measured],
        "lag": [one["sent"] - one["arrived"] for one in measured],
    }
    for name, values in times.items():
        assert figures[name]["count"] == 10
        assert figures[name]["mean"] == pytest.approx(np.mean(values))
        assert figures[name]["max"] == max(values)
        for share in (50, 90, 95, 99):
            assert figures[name][f"p{share}"] == pytest.approx(np.percentile(values, share))
    begin, end = measured[0]["arrived"], max(one["done"] for one in measured)
    inside = [one for one in records if begin < one["done"] <= end]
    assert figures["seconds"] == pytest.approx(end - begin)
    assert figures["images_per_s"] == pytest.approx(len(inside) / (end - begin))
    assert figures["image_steps_per_s"] == pytest.approx(sum(one["asked"]["steps"] for one in inside) / (end - begin))
    off = [one["eta_s"] / one["served_s"] - 1 for one in measured]
    assert figures["eta_error"]["bias"] == pytest.approx(np.median(off))
    assert figures["eta_error"]["p90"] == pytest.approx(np.percentile(np.abs(off), 90))
    assert (figures["done"], figures["errors"], figures["interrupted"]) == (10, {}, 0)
    assert figures["deadline_met"] == 1.0


def test_the_records_are_of_what_happened(told: Any) -> None:
    for one in told["runs"][0]["records"]:
        assert one["arrived"] <= one["sent"] < one["queued"] < one["done"]
        assert one["queued"] < one["first_step"] < one["done"]
        # The server's own times lie within what the client saw.
        assert 0 <= one["queue_s"] < one["served_s"] < one["done"] - one["sent"]
        assert one["steps"] == one["asked"]["steps"]
        assert (one["first_preview"] is None) <= (one["steps"] <= 2)
    assert {one["asked"]["guidance_scale"] for one in told["runs"][0]["records"]} == {1.0, 7.0}


def test_it_says_what_was_measured(told: Any) -> None:
    assert (told["urls"], told["client_version"], len(told["server_versions"])) == (1, told["server_versions"][0], 1)
    assert told["mix"]["steps"] == [2, 4, 6]
    assert told["extent"] == {"requests": 10, "seconds": None, "warm_up": 2}


def test_ctrl_c_cancels_what_is_under_way(server: Any, client: Any) -> None:
    def cancelled() -> float:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(server.metrics_url, timeout=10) as page:
            counts = re.findall(
                r"^diffuserve_requests_cancelled_total\{.*\} (\S+)$", page.read().decode(), re.MULTILINE
            )
        return sum(map(float, counts))

    before = cancelled()
    load = ("--concurrency", "3", "--requests", "500", "--warm-up", "0", "--steps", "150", "--json", "-")
    command = [sys.executable, "-m", "diffuserve_client", "bench", "--url", server.grpc_url, *load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: client.status()["active"] >= 3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("diffuserve: interrupted; these are the figures until then\n")
    assert json.loads(stdout)["runs"][0]["figures"]["interrupted"] == 3
    eventually(lambda: cancelled() == before + 3)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
