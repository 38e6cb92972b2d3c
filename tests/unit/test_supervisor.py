"""What the supervisor does about a server that dies, hangs or stands still, over a server that is made up."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffuserve.server import ServerOptions, ServerSetupError, ServerStartError, supervisor
from diffuserve.server.snapshot_key import SNAPSHOT_KEY_FILE, with_snapshot_key
from diffuserve.server.supervisor import Patience, Supervisor

GOOD = {"state": "serving", "stalled_s": 0.5}


class Server:
    """Each question how it is goes on to the next of the `answers`; where they end, the process has died.

    An answer that is an exception is raised, where the server is started if it stands first.
    """

    made: list[Server]
    scripts: list[list[Any]]
    clock = 0.0
    drained: Any = GOOD

    def __init__(self, options: ServerOptions) -> None:
        self.options, self.did = options, list[str]()
        self.is_ready, self.returncode = False, None
        self.launch = SimpleNamespace(ports=SimpleNamespace(http=1, grpc=2, metrics=3), models=("diffusion",))
        self.log_file, self._answers = Path("log"), list(Server.scripts[len(Server.made)])
        Server.made.append(self)

    def start(self) -> None:
        self.did.append("start")
        if self._answers and isinstance(self._answers[0], ServerStartError):
            raise self._answers.pop(0)

    def wait_ready(self) -> None:
        self.is_ready = True

    def wait(self, timeout: float) -> int | None:
        Server.clock += timeout
        return None if self._answers else 1

    def lost_public_model(self) -> bool:
        return bool(self._answers[0] == "lost")

    def status(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def drain(self, grace: float) -> Any:
        self.did.append(f"drain {grace:g}")
        return self.drained

    def stop(self, patience: float | None = None) -> None:
        self.did.append(f"stop {patience:g}" if patience else "stop")

    def kill(self) -> None:
        self.did.append("kill")

    def exit_reason(self) -> str:
        return "exit code 1"

    def log_tail(self) -> str:
        return "the end"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Server.made, Server.clock = [], 0.0
    monkeypatch.setattr(supervisor, "TritonServer", Server)
    monkeypatch.setattr(time, "monotonic", lambda: Server.clock)
    return []


def supervise(said: list[str], *scripts: list[Any], **patience: Any) -> Supervisor:
    Server.scripts = list(scripts)
    one = Supervisor(ServerOptions(Path("d"), http_port=0), Patience(**patience), said.append)
    one.start(lambda _: None)
    return one


def test_a_dead_server_is_started_again_on_the_same_ports(said: list[str]) -> None:
    one = supervise(said, [GOOD], [GOOD, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said[1:] == ["the server died (exit code 1); starting it again", "serving again"]
    options = Server.made[1].options
    assert (options.http_port, options.grpc_port, options.metrics_port) == (1, 2, 3)


def test_a_process_that_is_gone_is_not_waited_for(said: list[str]) -> None:
    one = supervise(said, [GOOD, "lost"], [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said[1] == "the public model's process is gone; starting it again"
    assert Server.clock == 3, "one second after it went"


@pytest.mark.parametrize("before", [[], [None, None, GOOD, *[None] * 5, GOOD]])
def test_silence_counts_from_the_last_good_answer_or_the_start(said: list[str], before: list[Any]) -> None:
    one = supervise(said, [*before, *[None] * 7, GOOD], [KeyboardInterrupt()], unresponsive=6.0)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said[1] == "the public model has not answered for 7 s; starting it again"
    assert Server.made[0].did == ["start", "kill", "stop"]


def test_half_a_minute_of_silence_on_a_busy_machine_is_no_death(said: list[str]) -> None:
    one = supervise(said, [GOOD, *[None] * 29, GOOD, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert len(Server.made) == 1


def test_a_loop_that_stands_still_is_ended(said: list[str]) -> None:
    one = supervise(said, [GOOD, {"stalled_s": 29.0}, {"stalled_s": 31.0}], [KeyboardInterrupt()], stalled=30.0)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said[1] == "the engines have stood still for 31 s; starting it again"


def test_a_server_that_dies_again_and_again_is_given_up(said: list[str]) -> None:
    one = supervise(said, *[[GOOD]] * 4, restarts=3)
    with pytest.raises(ServerStartError, match=r"died \(exit code 1\), after 3 new starts in 600 s(.|\n)*the end"):
        one.run()
    assert len(Server.made) == 4


def test_one_that_dies_now_and_then_is_not(said: list[str]) -> None:
    one = supervise(said, *[[GOOD] * 301] * 8, [KeyboardInterrupt()], restarts=3)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert len(Server.made) == 9


def test_a_new_start_that_fails_is_tried_again_within_the_same_limit(said: list[str]) -> None:
    failed = ServerStartError("the server died before it was ready (signal SIGKILL)\nThe log ends:")
    one = supervise(said, [GOOD], [failed], [failed], [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said[2:] == ["the server died before it was ready (signal SIGKILL); starting it again"] * 2 + [
        "serving again"
    ]
    assert [one.did for one in Server.made[1:3]] == [["start", "kill", "stop"]] * 2
    del said[:]
    Server.made = []
    with pytest.raises(ServerStartError, match="after 3 new starts"):
        supervise(said, [GOOD], *[[failed]] * 3, restarts=3).run()


def test_a_new_start_that_no_other_would_help_ends_it(said: list[str]) -> None:
    one = supervise(said, [GOOD], [ServerSetupError("there is no deployment at d")])
    with pytest.raises(ServerSetupError, match="there is no deployment"):
        one.run()
    assert len(Server.made) == 2


def test_the_end_drains_only_a_server_that_serves(said: list[str]) -> None:
    one = supervise(said, [GOOD], grace=7.0)
    one.stop()
    assert Server.made[0].did == ["start", "drain 7", "stop 3"]
    assert said[1:] == ["stopping; requests under way have 7 s"]
    Server.made[0].is_ready = False
    one.stop()
    assert Server.made[0].did[3:] == ["stop 3"]


def test_a_drain_that_nobody_answers_is_told(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "drained", None)
    supervise(said, [GOOD]).stop()
    assert "the server does not answer: what was under way is lost" in said[-1]


def test_a_drain_that_takes_its_time_leaves_less_for_the_end(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = supervise(said, [GOOD], grace=7.0)

    def slow(self: Server, grace: float) -> None:
        Server.clock += grace + 3.5

    monkeypatch.setattr(Server, "drain", slow)
    one.stop()
    assert Server.made[0].did[-1] == "stop 1"


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSERVE_SNAPSHOT_KEY", raising=False)
    first, second = (with_snapshot_key(ServerOptions(tmp_path, environment={"A": "b"})) for _ in range(2))
    assert first.environment == second.environment
    assert len(first.environment["DIFFUSERVE_SNAPSHOT_KEY"]) == 64
    assert (tmp_path / SNAPSHOT_KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [SNAPSHOT_KEY_FILE]
    monkeypatch.setenv("DIFFUSERVE_SNAPSHOT_KEY", "of the whole fleet")
    assert with_snapshot_key(ServerOptions(tmp_path)).environment["DIFFUSERVE_SNAPSHOT_KEY"] == "of the whole fleet"
    monkeypatch.setenv("DIFFUSERVE_SNAPSHOT_KEY", "short")
    with pytest.raises(ServerSetupError, match="has 5 characters, and needs 16"):
        with_snapshot_key(ServerOptions(tmp_path))


def test_a_key_that_cannot_be_kept_is_one_for_this_start_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DIFFUSERVE_SNAPSHOT_KEY", raising=False)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    first, second = (with_snapshot_key(ServerOptions(tmp_path)).environment for _ in range(2))
    assert first != second
    assert list(tmp_path.iterdir()) == []
    assert "snapshot.key cannot be written (No space left on device): snapshots of this start can" in caplog.text
    caplog.clear()
    with_snapshot_key(ServerOptions(tmp_path / "none"))
    assert not caplog.text, "that there is no deployment is said by the start"


@pytest.mark.parametrize(("content", "reason"), [(b"\xff" * 32, "cannot be read as a key"), (b"", "has 0 characters")])
def test_a_key_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    monkeypatch.delenv("DIFFUSERVE_SNAPSHOT_KEY", raising=False)
    (tmp_path / SNAPSHOT_KEY_FILE).write_bytes(content)
    with pytest.raises(ServerSetupError, match=rf"{reason}.*remove"):
        with_snapshot_key(ServerOptions(tmp_path))
