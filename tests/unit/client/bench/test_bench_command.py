"""`diffuserve bench` against a server that answers by a script, over gRPC."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from diffuserve.errors import QueueFullError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._command import app
from unit.client.conftest import Serve
from unit.client.fake_triton import FakeTriton, Script, answer, failure, response

STATUS = {"state": "serving", "waiting": 0, "active": 0, "version": "9.9", "checkpoints": {}}
STEP_S = 0.02


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("DIFFUSERVE_URL", "DIFFUSERVE_RETRIES"):
        monkeypatch.delenv(name, raising=False)


def with_status(script: Script) -> Script:
    """A server that says how it is, and else does as the script says."""

    def both(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.prompt:
            yield from script(fake, request)
        else:
            fake.requests.pop()
            yield response(Event(kind="status", info=STATUS), final=True)

    return both


def slowly(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    """STEP_S until it is queued, and for each step; the server says that it waited 0.25 s, and had expected double."""
    steps = request.steps or 0
    time.sleep(STEP_S)
    yield response(Event(kind="queued", info={"eta_ms": 1000}))
    for step in range(1, steps + 1):
        time.sleep(STEP_S)
        if request.progress_every and step < steps:
            yield response(Event(kind="progress", step=step, steps=steps, info={}))
    info = {"steps": steps, "queued_s": 0.25, "run_s": 0.25, "eta_s": 1.0}
    yield response(Event(kind="image", step=steps, steps=steps, data=b"picture", info=info), final=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_figures_are_the_servers_delays(serve: Serve, tmp_path: Path) -> None:
    fake = serve(with_status(slowly))
    load = ("--concurrency", "1,3", "--requests", "6", "--warm-up", "1", "--steps", "4", "--prompt", "a")
    result = run("--url", fake.url, *load, "--json", "out.json", "--plot", "out.png")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (told["urls"], told["server_versions"], told["extent"]["warm_up"]) == (1, ["9.9"], 1)
    assert told["mix"]["steps"] == [4]
    assert len(fake.requests) == 2 * 7
    assert {one.steps for one in fake.requests} == {4}
    for at_once, measured in zip((1, 3), told["runs"], strict=True):
        figures = measured["figures"]
        assert measured["load"] == {"loop": "closed loop", "concurrency": at_once}
        assert (figures["requests"], figures["done"], figures["errors"]) == (6, 6, {})
        # The delays are the least; how much more it is, is up to the machine.
        for name, steps in {"queued": 1, "first_step": 2, "latency": 5}.items():
            assert steps * STEP_S <= figures[name]["p50"] < steps * STEP_S + 0.5
        assert figures["queue"]["max"] == 0.25
        assert figures["eta_error"] == {"count": 6, "p50": 1.0, "p90": 1.0, "bias": 1.0}
        assert figures["images_per_s"] <= at_once / (5 * STEP_S)
    for words in ("closed loop, 3 at once", "latency", "6 of 6 requests done; no errors", "forecast was off by 100%"):
        assert words in result.stdout


def test_an_open_loop_sends_without_waiting(serve: Serve) -> None:
    fake = serve(with_status(slowly))
    result = run(
        "--url", fake.url, "--rate", "100", "--requests", "12", "--warm-up", "0", "--steps", "3", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)  # and nothing else, the table being on stderr
    assert "open loop, 100 requests/s" in result.stderr
    records = told["runs"][0]["records"]
    assert all(one["sent"] - one["arrived"] < 0.5 for one in records)
    assert max(one["sent"] for one in records) < max(one["done"] for one in records)
    assert min(one["done"] for one in records) < max(one["done"] for one in records) - STEP_S


def test_errors_are_told_by_code_and_not_tried_again(serve: Serve) -> None:
    turns = iter(range(100))

    def every_other(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if next(turns) % 2:
            yield failure(QueueFullError("256 images are here", eta_ms=5))
        else:
            yield from answer(fake, request)

    fake = serve(with_status(every_other))
    result = run("--url", fake.url, "--requests", "10", "--warm-up", "0", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "5 of 10 requests done; 5 queue_full" in result.stdout
    assert len(fake.requests) == 10


def test_a_run_of_errors_alone_is_a_failure(serve: Serve) -> None:
    fake = serve(with_status(lambda *_: iter([failure(QueueFullError("256 images are here"))])))
    result = run("--url", fake.url, "--requests", "3", "--warm-up", "0")
    assert (result.exit_code, result.stderr) == (
        1,
        "diffuserve: no request was done; the first one's error: 256 images are here\n",
    )
    assert "3 queue_full" in result.stdout


def test_every_server_must_be_there(serve: Serve) -> None:
    fake = serve(with_status(answer))
    result = run("--url", f"{fake.url},localhost:1")
    assert result.exit_code == 3
    assert re.fullmatch(r"diffuserve: cannot reach a server at localhost:1 .*\n", result.stderr)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "2", "--rate", "3"], "give one of them"),
        (["--concurrency", "2,many"], "--concurrency has 'many', and must be a whole number, or several with commas"),
        (["--concurrency", "2,"], "--concurrency has ''"),
        (["--rate", "0"], "rate is 0.0"),
        (["--size", "512"], "must be a size such as 512x512"),
        (["--steps", "4,999"], "steps is 999"),
        (["--requests", "5", "--duration", "5"], "said once"),
        (["--retries", "3"], "never tries again"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--plot", "figure.docx"], "does not end in .png or .svg"),
        (["--plot", "nowhere/figure.png"], "the folder nowhere does not exist"),
        (["--json", "nowhere/figures.json"], "the folder nowhere does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(arguments: list[str], words: str) -> None:
    result = run("--url", "localhost:1", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_cancels_on_the_server_and_tells_what_was_measured(serve: Serve, tmp_path: Path) -> None:
    under_way, cancelled = threading.Event(), threading.Event()
    turns = iter(range(100))

    def five_and_then_none(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if next(turns) < 5:
            yield from answer(fake, request)
            return
        fake.over.clear()
        under_way.set()
        if fake.over.wait(60):
            cancelled.set()

    fake = serve(with_status(five_and_then_none))
    command = [sys.executable, "-m", "diffuserve_client", "bench", "--url", fake.url, "--steps", "2"]
    with subprocess.Popen(
        [*command, "--requests", "90", "--warm-up", "2", "--json", "out.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert under_way.wait(60)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "diffuserve: interrupted; these are the figures until then\n")
    assert cancelled.wait(30)
    assert "3 of 4 requests done; no errors; 1 interrupted" in stdout
    (measured,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    assert measured["interrupted"]
    assert [one["error"] for one in measured["records"]] == [None] * 5 + ["interrupted"]
