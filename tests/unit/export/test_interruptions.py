"""Ctrl-C, a kill and a full disk in the middle of an export: nothing half-written, no process left, no traceback."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from diffuserve_export import (
    CheckpointError,
    ExportError,
    ExportOptions,
    assembly,
    command,
    export_checkpoint,
    graph_process,
)
from diffuserve_export.engines import build, engine_from_onnx
from diffuserve_export.engines.build import EngineError
from diffuserve_export.graph_process import Server
from diffuserve_export.report import Report
from diffuserve_export.workspace import Workspace
from unit.export.conftest import Exported, Recorder
from unit.export.engine_graphs import convolution, request

BUILD = (
    "import sys; from pathlib import Path; from unit.export.engine_graphs import request; "
    "from diffuserve_export.engines import engine_from_onnx; "
    "engine_from_onnx(Path(sys.argv[1]), request(), Path(sys.argv[2]), print)"
)


def wait_until(happened: Callable[[], Any]) -> Any:
    """What `happened` gives once that is true; files tell nobody when they are there."""
    deadline = time.monotonic() + 120
    while not (result := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return result


def test_ctrl_c_ends_the_command_and_leaves_nothing(saved_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffuserve_export", "--checkpoint", str(saved_checkpoint), "--out", str(out)]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: list(out.glob(".export-*/models/*")))
        processes = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        _, said = run.communicate()
    assert run.returncode == 130
    assert said == f"interrupted: what was in {out} before is as it was\n"
    assert not out.exists()
    assert psutil.wait_procs(processes, timeout=60)[1] == []


@pytest.mark.parametrize("interrupted", range(1, 4))
def test_ctrl_c_while_publishing_completes_it(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs_from_store: None, interrupted: int
) -> None:
    calls, rename = iter(range(1, 1000)), Path.rename

    def once(path: Path, target: Path) -> Path:
        if next(calls) == interrupted:
            raise KeyboardInterrupt
        return rename(path, target)

    publish = Workspace.publish

    def publish_with_interruption(*arguments: Any) -> None:
        monkeypatch.setattr(Path, "rename", once)
        publish(*arguments)

    monkeypatch.setattr(Workspace, "publish", publish_with_interruption)
    options = ExportOptions(checkpoint=str(exported.checkpoint), out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt, match=f"tiny was complete by then, and is in {tmp_path / 'out'}"):
        export_checkpoint(options)
    report = Recorder()
    export_checkpoint(options, report)
    assert report.notes == [f"tiny is up to date in {tmp_path / 'out'}"]


def test_the_command_says_what_became_of_an_export_that_was_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt("tiny was complete by then, and is in out")

    monkeypatch.setattr(command, "export_checkpoint", interrupted)
    result = CliRunner().invoke(command.app, ["--checkpoint", "c", "--out", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (130, "interrupted: tiny was complete by then, and is in out\n")


def test_a_killed_export_takes_its_builder_with_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", BUILD, str(convolution(tmp_path / "model.onnx")), str(cache)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "tests"}) as run:
        (builder,) = wait_until(lambda: psutil.Process(run.pid).children())
        run.kill()
    builder.wait(60)
    assert [path.name[:7] for path in cache.iterdir()] == [".build-"]
    folder = engine_from_onnx(tmp_path / "model.onnx", request(), cache, pytest.fail)
    assert list(cache.iterdir()) == [folder]


def test_a_build_that_goes_on_is_not_abandoned(tmp_path: Path) -> None:
    with build._new_folder(tmp_path / "one") as first, build._new_folder(tmp_path / "two"):
        assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can be larger: to whoever writes one, that looks like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_engine_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    graph = convolution(tmp_path / "model.onnx")
    with small_disk(6000), pytest.raises(EngineError, match="File too large"):
        engine_from_onnx(graph, request(), tmp_path / "cache", pytest.fail)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """What the process that makes graphs does instead: a function of `other_process`."""
    servers: list[Server] = []

    def start(what: str) -> None:
        servers.append(Server(sys.executable, str(Path(__file__).with_name("other_process.py")), what))
        monkeypatch.setattr(graph_process, "_server", servers[-1])

    yield start
    for one in servers:
        one.stop()


def graph(report: Report) -> Any:
    plan: Any = None
    return graph_process.graph_from_component(plan, "unet", Path("model.onnx"), report)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("is_killed", "was ended by signal 9; it may have run out of memory"),
        ("ends_altogether", "was ended by signal 9; it may have run out of memory"),
        ("says_what_it_cannot_send", "ended with 1"),
    ],
)
def test_a_graphs_process_that_ends_is_an_error(elsewhere: Callable[[str], None], what: str, how: str) -> None:
    elsewhere(what)
    with pytest.raises(ExportError, match=f"unet: the process that made its graph {how}"):
        graph(Report())


def test_what_a_graphs_process_says_and_raises_comes_through(elsewhere: Callable[[str], None]) -> None:
    elsewhere("lacks_weights")
    report = Recorder()
    for _ in range(2):  # it serves again after an error
        with pytest.raises(CheckpointError, match="lacks weights") as raised:
            graph(report)
        assert raised.value.__cause__ is None
    assert report.notes == ["it looks at the weights"] * 2


def test_a_disk_that_becomes_full_is_an_error(
    saved_checkpoint: Path, tmp_path: Path, elsewhere: Callable[[str], None]
) -> None:
    elsewhere("has_no_room")
    options = ExportOptions(checkpoint=str(saved_checkpoint), out=tmp_path / "out")
    with pytest.raises(ExportError, match=r"model\.onnx cannot be written: No space .* needs 0\.\d\d GB") as raised:
        export_checkpoint(options)
    assert "in has_no_room" in str(raised.value.__cause__.__cause__)  # type: ignore[union-attr]
    assert not (tmp_path / "out").exists()


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(
    saved_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(assembly, "graph_from_component", fail)
    with pytest.raises(PermissionError):
        export_checkpoint(ExportOptions(checkpoint=str(saved_checkpoint), out=tmp_path / "out"))
