"""What goes wrong around the command is told in one line, with what to do, and by the exit code."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from typer.testing import CliRunner, Result

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._command import app
from diffuserve_client._files import check_writable
from unit.client.fake_triton import FakeTriton, image, progress, response, silence

COMMAND = [sys.executable, "-m", "diffuserve_client"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command sets it, and would leave it to later tests
    monkeypatch.setenv("DIFFUSERVE_RETRIES", "0")


def failed(*arguments: str) -> tuple[int, str]:
    """The exit code, and the one line on stderr."""
    result: Result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("diffuserve: ")
    return result.exit_code, line.removeprefix("diffuserve: ")


@pytest.mark.parametrize("command", [("generate", "a"), ("models",)])
def test_no_server(command: tuple[str, ...]) -> None:
    code, line = failed(*command, "--url", "localhost:1")
    assert code == 3
    assert line.startswith("cannot reach a server at localhost:1 (")
    assert "start it (make serve) or correct the address, which is host:port of its gRPC port" in line


def test_tls_with_a_server_that_does_not_speak_it(fake: FakeTriton) -> None:
    code, line = failed("generate", "a", "--url", fake.url, "--tls")
    assert code == 3
    assert line.startswith(f"TLS with the server at {fake.url} failed (it does not speak TLS); connect without tls")


def test_tls_with_a_server_that_is_not_trusted(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    theirs = authority.issue_cert("localhost")
    for name, one in (("ca", authority), ("other", other)):
        one.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    pair = (theirs.private_key_pem.bytes(), theirs.cert_chain_pems[0].bytes())
    fake = FakeTriton(credentials=grpc.ssl_server_credentials([pair]))
    try:
        result = CliRunner().invoke(app, ["generate", "a", "--url", fake.url, "--tls-ca", "ca.pem"])
        assert result.exit_code == 0, result.stderr
        code, line = failed("generate", "a", "--url", fake.url, "--tls-ca", "other.pem")
        assert code == 3
        assert line.startswith(f"TLS with the server at {fake.url} failed (")
        assert "ca must be the authority that signed the server's certificate" in line
        code, line = failed("generate", "a", "--url", fake.url)
        assert (code, "expects TLS" in line) == (3, True)
    finally:
        fake.stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tls-ca", "none.pem"), "cannot read none.pem: No such file or directory; give a PEM file"),
        (("--tls-cert", "a.pem"), "a client's certificate needs its key, and the key it; give both"),
        (("--token", "secret", "--url", "gpu-1:8001"), "a token would go to gpu-1:8001 in clear text; give tls, or"),
        (("--retries=-1",), "retries is -1, and must be from 0 to 1000; 0 is off"),
        (("--url", "localhost:1,"), "the address is '', and must be host:port of the server's gRPC port"),
    ],
)
def test_connections_that_cannot_be_meant(options: tuple[str, ...], said: str) -> None:
    code, line = failed("generate", "a", *options)
    assert code == 2
    assert line.startswith(said)


@pytest.mark.parametrize("command", [("generate", "a"), ("models",), ("health",)])
def test_a_broken_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setenv("DIFFUSERVE_CONFIG", str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text("url = [")
    code, line = failed(*command)
    assert code == 2
    assert line.startswith(f"the configuration {tmp_path}/mine.toml: ")
    assert line.endswith("; correct it")


def test_a_server_that_stops_answering(fake: FakeTriton) -> None:
    def stops(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(progress(1, request.steps))
        yield from silence(fake, request)

    fake.script = stops
    code, line = failed("generate", "a", "--url", fake.url, "--stall", "2")
    assert code == 3
    assert line.startswith(f"nothing came from {fake.url} for 2 s, 0 of 1 images received")
    assert "send the request again when the server is back" in line


def test_a_server_that_goes_away(fake: FakeTriton, tmp_path: Path) -> None:
    def goes(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(progress(1, request.steps))
        fake._server.stop(0)
        yield from silence(fake, request)

    fake.script = goes
    code, line = failed("generate", "a", "--url", fake.url, "--preview-every", "1")
    assert code == 3
    assert line.startswith(f"the connection to {fake.url} was lost, 0 of 1 images received")
    assert list(tmp_path.iterdir()) == []


def test_a_command_line_that_cannot_be_meant_is_2_without_a_traceback() -> None:
    for arguments in (("generate", "a", "--nonsense"), ("paint", "a"), ("generate", "a", "--steps", "x"), ("img2img",)):
        result = CliRunner().invoke(app, list(arguments))
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit), "no traceback"
        assert "--help" in result.stderr


def test_a_file_that_is_half_written_when_there_is_no_room(fake: FakeTriton, tmp_path: Path) -> None:
    """The kernel refuses to write past 1 MB; the picture has 3, and the name has an older one."""
    fake.script = lambda *_: iter([response(image(data=b"p" * 3_000_000), final=True)])
    (tmp_path / "out.png").write_bytes(b"older")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = subprocess.run(
        [*COMMAND, "generate", "a"],
        env={**os.environ, "DIFFUSERVE_URL": fake.url, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "diffuserve: cannot write out.png: File too large; choose another place with --output\n",
    )
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.png", b"older")]


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Become a user to whom modes of files mean something."""
    yield (lambda: os.seteuid(65534)) if os.geteuid() == 0 else (lambda: None)
    if os.getuid() == 0:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written_to(as_nobody: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, closed = Path(name), Path(name, "closed")
        closed.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        closed.chmod(stat.S_IRUSR)
        as_nobody()
        with pytest.raises(InvalidArgumentError, match=f"the folder {folder} cannot be written to; choose another"):
            check_writable(folder / "a.png")
        with pytest.raises(InvalidArgumentError, match=f"the folder {closed}/x cannot be written to"):
            check_writable(closed / "x" / "a.png")
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(stat.S_IRWXU)
        closed.chmod(stat.S_IRWXU)


def test_a_read_only_folder_is_told_before_the_server_is_asked(
    fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    code, line = failed("generate", "a", "-o", "theirs/a.png", "--url", fake.url)
    assert (code, line) == (2, "the folder theirs cannot be written to; choose another")
    assert fake.requests == []


def test_a_file_that_a_preview_would_take_is_left_alone(fake: FakeTriton, tmp_path: Path) -> None:
    mine = tmp_path / "out-1.preview.png"
    mine.write_bytes(b"mine")
    code, line = failed("generate", "a", "-n", "2", "--preview-every", "1", "--url", fake.url)
    assert (code, fake.requests) == (2, [])
    assert line.startswith("out-1.preview.png is there already, and is no preview of this request; move it away")
    assert mine.read_bytes() == b"mine"


def test_a_preview_that_cannot_be_written_ends_the_request(fake: FakeTriton, tmp_path: Path) -> None:
    def previews(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        (tmp_path / "out.preview.png").mkdir()
        yield response(Event(kind="preview", step=1, steps=2, data=b"p", info={}))
        yield from silence(fake, request)

    fake.script = previews
    code, line = failed("generate", "a", "--preview-every", "1", "--url", fake.url)
    assert (code, line) == (1, "cannot write out.preview.png: Is a directory; choose another place with --output")
    assert fake.over.wait(10), "it is cancelled on the server"
