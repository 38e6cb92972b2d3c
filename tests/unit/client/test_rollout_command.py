"""`diffuserve rollout`: what it writes, what it says, and what it exits with. A server's part is in test_rollout."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from diffuserve.rollout import read_table
from diffuserve_client._command import app
from unit.fakes import write_deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    write_deployment(tmp_path / "shop", "v1", "v2")
    return tmp_path / "shop"


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["rollout", command, *map(str, arguments)])


def test_from_the_first_share_to_the_way_back(deployment: Path) -> None:
    first = run("set", deployment, "shop=v1:90,v2:10", "--default")
    assert (first.exit_code, first.stdout) == (0, "default: shop\nshop: v1 90 %, v2 10 %; stable v1\n")
    assert run("promote", deployment, "shop").stdout == "default: shop\nshop: v2 100 %; stable v2\n"
    assert run("rollback", deployment, "shop").stdout == "default: shop\nshop: v1 100 %; stable v1\n"
    told = json.loads(run("status", deployment, "--json").stdout)
    assert told == {
        "table": read_table(deployment)[1],
        "default": "shop",
        "aliases": {"shop": {"shares": {"v1": 1.0}, "stable": ["v1"]}},
    }
    assert json.loads(run("promote", deployment, "shop", "--json").stdout) == told
    assert run("remove", deployment, "shop").stdout == "default: the first checkpoint\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("set", "shop=v1,v9"), "names v9; there are v1, v2"),
        (("set", "v1=v2"), "has a checkpoint's name"),
        (("set", "shop"), "is no alias with weights"),
        (("promote", "shop"), "there is no alias 'shop'; there are other"),
        (("promote", "other", "v2"), "other has v1 and not v2; give it a share first with set"),
        (("rollback", "other"), "other has had no checkpoint before v1"),
        (("remove", "shop"), "there is no alias"),
    ],
)
def test_what_changes_nothing(deployment: Path, arguments: tuple[str, ...], message: str) -> None:
    assert run("set", deployment, "other=v1").exit_code == 0
    before = read_table(deployment)
    command, *others = arguments
    result = run(command, deployment, *others)
    assert result.exit_code == 2
    assert message in result.stderr
    assert read_table(deployment) == before


def test_folders_that_are_no_deployment(deployment: Path, tmp_path: Path) -> None:
    assert run("set", tmp_path, "shop=v1").exit_code == 2
    (deployment / "rollout.json").write_text("{")
    for command in (("status",), ("set", "shop=v1")):
        assert run(command[0], deployment, *command[1:]).exit_code == 2


class FakeServer(HTTPServer):
    """Answers `operation=status` with what the test says, one answer after another; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[dict[str, Any] | Callable[[], dict[str, Any]]] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        assert isinstance(server, FakeServer)
        told = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self._answer(json.dumps({"info": json.dumps(told() if callable(told) else told)}).encode())

    def do_GET(self) -> None:
        self._answer(b'{"name": "triton"}')

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def told(**values: Any) -> dict[str, Any]:
    return {"rollout": {"table": "", "refused": None, "problem": "", "loading": None, "failed": {}, **values}}


def test_it_waits_until_the_server_follows(
    deployment: Path, fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffuserve_client._rollout._POLL_SECONDS", 0.01)
    assert run("set", deployment, "shop=v1").exit_code == 0
    digest = read_table(deployment)[1]
    where = ("--server", f"http://127.0.0.1:{fake_server.server_port}/")
    fake_server.answers = [told(), told(problem="names v2", loading="v2"), told(table=digest)]
    done = run("set", deployment, "shop=v1", *where)
    assert (done.exit_code, len(fake_server.answers)) == (0, 1)
    assert "in effect on the server: yes" in done.stdout
    # What it says of the table before this one is no answer, even where that one was the same; nor is a slow answer.
    earlier = told(problem="names v2", failed={"v2": "too large"}, refused=1)
    fake_server.answers = [earlier, {}, told(table=read_table(deployment)[1]), {}]
    assert run("set", deployment, "shop=v1", *where).exit_code == 0

    def refusal() -> dict[str, Any]:
        written = (deployment / "rollout.json").stat().st_mtime_ns
        return told(problem="names v2", failed={"v2": "still too large"}, refused=written)

    fake_server.answers = [earlier, refusal]
    refused = run("set", deployment, "shop=v2", *where)
    assert refused.exit_code == 1
    assert "goes on as before: names v2 (v2: still too large)" in refused.stderr
    assert "v2 failed: still too large" in run("status", deployment, *where).stdout
    fake_server.answers = [told()]
    late = run("set", deployment, "shop=v2", *where, "--timeout", "0.05")
    assert (late.exit_code, "does not follow this folder" in late.stderr) == (1, True)
    fake_server.answers = [{}]
    silent = run("set", deployment, "shop=v2", *where, "--timeout", "0.05")
    assert (silent.exit_code, "no diffuserve server answers" in silent.stderr) == (3, True)


def test_no_server_there(deployment: Path) -> None:
    for command in (("status", deployment), ("set", deployment, "shop=v1")):
        result = run(*command, "--server", "http://127.0.0.1:9")
        assert result.exit_code == 3
        assert "no diffuserve server answers at http://127.0.0.1:9" in result.stderr


def test_the_status_of_a_folder_that_is_no_deployment(tmp_path: Path) -> None:
    result = run("status", tmp_path / "mistyped")
    assert result.exit_code == 2
    assert "mistyped is no deployment" in result.stderr
