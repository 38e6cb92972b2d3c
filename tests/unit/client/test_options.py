"""The options that all commands share, and what else says where the server is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve_client import Retry, Timeout, Tls
from diffuserve_client._config import CONFIG_KEYS, config_path, read_config
from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._extras import extra
from diffuserve_client._options import AsJson, ConnectionOptions, connection_arguments, open_client, with_options


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file's path; it is not there yet, and nothing is in the environment."""
    for name in CONFIG_KEYS:
        monkeypatch.delenv(f"DIFFUSERVE_{name.upper()}", raising=False)
    monkeypatch.delenv("DIFFUSERVE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "diffuserve" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # which open_client sets, and would leave it to later tests
    return path


def arguments_of(*options: str, timeout: float | None = None) -> dict[str, Any]:
    """What a command's client is made with."""
    told: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_options
    def ask(word: Annotated[str, typer.Argument()], connection: ConnectionOptions, as_json: AsJson = False) -> None:
        with errors_as_exit_codes():
            told.update(connection_arguments(connection, timeout=timeout), word=word, as_json=as_json)

    result = CliRunner().invoke(app, ["word", *options])
    assert result.exit_code == 0, result.output
    assert told.pop("word") == "word"
    assert told.pop("as_json") == ("--json" in options)
    return told


def test_an_option_goes_before_the_environment_and_that_before_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arguments_of("--json") == {
        "url": ["localhost:8001"],
        "timeout": Timeout(),
        "retry": None,
        "tls": None,
        "token": None,
    }
    assert arguments_of("--stall", "40", timeout=10.0)["timeout"] == Timeout(total=10, stall=40)
    config.write_text(
        "url = 'file:1'\ntimeout = 30\nstall = 20\nretries = 1\ntls_ca = 'ca.pem'\ntoken = 'from the file'"
    )
    config.chmod(0o600)
    from_file = {
        "url": ["file:1"],
        "timeout": Timeout(total=30, stall=20),
        "retry": Retry(retries=1),
        "tls": Tls(ca=str(config.parent / "ca.pem")),
        "token": "from the file",
    }
    assert arguments_of(timeout=10.0) == from_file
    monkeypatch.setenv("DIFFUSERVE_URL", "environment:1,environment:2")
    monkeypatch.setenv("DIFFUSERVE_TIMEOUT", "")  # as good as none
    monkeypatch.setenv("DIFFUSERVE_TOKEN", "from the environment")
    from_environment = {"url": ["environment:1", "environment:2"], "token": "from the environment"}
    assert arguments_of() == {**from_file, **from_environment}
    where = ("--url", "option:1", "--url", "option:2", "--timeout", "1.5", "--retries", "0")
    options = (*where, "--token", "from-the-option", "--no-tls")
    assert arguments_of(*options) == {
        "url": ["option:1", "option:2"],
        "timeout": Timeout(total=1.5, stall=20),
        "retry": Retry(retries=0),
        "tls": None,
        "token": "from-the-option",
    }


@pytest.mark.parametrize(
    ("options", "tls"),
    [
        (("--tls",), Tls()),
        (("--tls-ca", "ca.pem"), Tls(ca="ca.pem")),
        (("--tls-cert", "a.pem", "--tls-key", "b.pem"), Tls(cert="a.pem", key="b.pem")),
        (("--tls-server-name", "gpu", "--tls"), Tls(server_name="gpu")),
    ],
)
@pytest.mark.parametrize("in_file", ["", "tls = false"])
def test_any_tls_option_asks_for_it(options: tuple[str, ...], tls: Tls, in_file: str, config: Path) -> None:
    config.write_text(in_file)
    assert arguments_of(*options)["tls"] == tls


@pytest.mark.parametrize(
    ("options", "in_file", "tls"),
    [
        ((), "tls = false\ntls_ca = '/ca.pem'", None),
        (("--no-tls",), "tls_ca = '/ca.pem'", None),
        (("--tls",), "tls = false\ntls_ca = '/ca.pem'", Tls(ca="/ca.pem")),
        (("--tls-server-name", "gpu"), "tls = false\ntls_ca = '/ca.pem'", Tls(ca="/ca.pem", server_name="gpu")),
    ],
)
def test_the_last_word_on_tls_is_the_options(
    options: tuple[str, ...], in_file: str, tls: Tls | None, config: Path
) -> None:
    config.write_text(in_file)
    assert arguments_of(*options)["tls"] == tls


def test_options_that_ask_for_tls_and_refuse_it_are_no_clear_text() -> None:
    with pytest.raises(InvalidArgumentError, match="--no-tls and --tls-server-name contradict each other"):
        connection_arguments(ConnectionOptions(tls=False, tls_server_name="gpu"))


def test_every_key_of_the_file_is_an_option() -> None:
    assert set(CONFIG_KEYS) == set(ConnectionOptions.__dataclass_fields__)


def test_the_client_is_open(config: Path) -> None:
    config.write_text("timeout = 12")
    with open_client(ConnectionOptions(url=["localhost:1", "localhost:2"])) as client:
        assert client.urls == ("localhost:1", "localhost:2")
        assert (client.timeout.total, client.timeout.connect) == (12, 5)
        assert client.retry == Retry()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("urls = 'a:1'", "unknown key 'urls'; known are url, timeout, stall, retries, token, tls, "),
        ("url = 3", "url must be a text, or a list of texts, and is '3'; correct it"),
        ("url = []", "url must be a text, or a list of texts"),
        ("timeout = 'soon'", "timeout must be a number of seconds, and is 'soon'"),
        ("timeout = true", "timeout must be a number of seconds"),
        ("stall = 'soon'", "stall must be a number of seconds, and is 'soon'"),
        ("retries = 1.5", "retries must be a whole number"),
        ("tls = 1", "tls must be true or false"),
        ("token = 123456", "token must be a text; correct it"),
        ("url = ", "Invalid value (at end of document); correct it"),
        ("url = 'a'\nurl = 'b'", "Cannot overwrite a value"),
        (b"\xff", "'utf-8' codec can't decode"),
        (b"#" * (1 << 20) + b"\n", "it has more than 1048576 bytes"),
    ],
)
def test_a_broken_file_is_refused(config: Path, content: str | bytes, said: str) -> None:
    config.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidArgumentError) as caught:
        read_config()
    assert caught.value.message.startswith(f"the configuration {config}: {said}")


def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERVE_CONFIG", str(tmp_path / "mine.toml"))
    assert config_path() == tmp_path / "mine.toml"
    with pytest.raises(InvalidArgumentError, match="there is none, and DIFFUSERVE_CONFIG names it"):
        read_config()
    (tmp_path / "mine.toml").write_text("tls_ca = 'ca.pem'\ntls_key = '/etc/key.pem'\nurl = ['a:1', 'b:1']")
    assert read_config() == {"tls_ca": str(tmp_path / "ca.pem"), "tls_key": "/etc/key.pem", "url": ["a:1", "b:1"]}
    monkeypatch.setenv("DIFFUSERVE_CONFIG", str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="it cannot be read: Is a directory"):
        read_config()


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_token_that_others_can_read_is_told(
    config: Path, mode: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("token = 'secret'")
    config.chmod(mode)
    assert read_config() == {"token": "secret"}
    said = capsys.readouterr().err
    assert ("holds a token, and others on this machine can read it; chmod 600 it" in said) == warned
    assert "secret" not in said
    assert "secret" not in repr(ConnectionOptions(token="secret"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(UnsupportedError) as caught, extra("tools"):
        import imageio  # noqa: F401
    assert caught.value.message == "this needs imageio, which is not installed; pip install 'diffuserve[tools]'"
