from __future__ import annotations

import inspect
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from diffuserve.logs import JsonFormatter, LogTelemetry
from diffuserve.telemetry import Fanout, Telemetry


@pytest.fixture
def lines() -> Iterator[Any]:
    """Every line that was logged so far, read back."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_holds_what_happened_where_and_for_whom(lines: Any) -> None:
    logging.getLogger("some.where").warning("%d of %d", 1, 2, extra={"request_id": "7", "checkpoint": "shapes"})
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert list(line.items()) == [
        ("level", "WARNING"),
        ("logger", "some.where"),
        ("message", "1 of 2"),
        ("request_id", "7"),
        ("checkpoint", "shapes"),
    ]


def test_a_request_ends_in_one_line_each_way(lines: Any) -> None:
    telemetry = LogTelemetry()
    telemetry.accepted("a\nb", "shapes", 1.23456)
    telemetry.ended("a\nb", "shapes", "cancelled", 1.23456, 2.0)
    accepted, ended = lines()
    assert (accepted["message"], accepted["request_id"], accepted["eta_s"]) == ("request accepted", "a\nb", 1.235)
    assert (ended["message"], ended["outcome"], ended["seconds"]) == ("request ended", "cancelled", 2.0)


def test_an_exception_stays_on_its_line(lines: Any) -> None:
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("some.where").exception("it failed")
    (line,) = lines()
    assert line["message"] == "it failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'x'")


def run(script: str) -> subprocess.CompletedProcess[str]:
    script = f"import logging, warnings\nfrom diffuserve.logs import log_as_json\n{script}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_a_process_that_logs_as_json_does_so_for_every_logger_and_warning() -> None:
    done = run(
        "logging.basicConfig()\nlog_as_json('info')\n"
        "logging.getLogger('a').info('one')\nlogging.getLogger('a').debug('too fine')\nwarnings.warn('two')"
    )
    one, two = [json.loads(line) for line in done.stderr.splitlines()]
    assert (one["logger"], one["message"]) == ("a", "one")
    assert (two["logger"], two["level"]) == ("py.warnings", "WARNING")
    assert "two" in two["message"]


def test_an_unknown_level_is_refused_by_name() -> None:
    done = run("log_as_json('LOUD')")
    assert "the log level is 'LOUD', and must be DEBUG, INFO" in done.stderr


def test_values_that_json_does_not_know_become_text() -> None:
    record = logging.makeLogRecord({"msg": "m", "where": {1}, "module_": sys.byteorder})
    assert json.loads(JsonFormatter().format(record))["where"] == "{1}"


def test_a_fanout_passes_every_call_of_the_port_on() -> None:
    calls: list[tuple[int, str, tuple[Any, ...]]] = []

    def listener(number: int) -> Telemetry:
        methods = {
            name: (lambda self, *values, name=name: calls.append((number, name, values)))
            for name in vars(Telemetry)
            if not name.startswith("_")
        }
        made: Telemetry = type("Listener", (Telemetry,), methods)()
        return made

    fanout = Fanout(listener(1), listener(2))
    names = [name for name in vars(Telemetry) if not name.startswith("_")]
    assert len(names) >= 6
    for name in names:
        values = tuple(range(len(inspect.signature(getattr(Telemetry, name)).parameters) - 1))
        getattr(fanout, name)(*values)
        assert calls[-2:] == [(1, name, values), (2, name, values)]
