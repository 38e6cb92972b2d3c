"""The command on the real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner, Result

from diffuserve_client import Client
from diffuserve_client._command import app

PROMPT = "a large red circle on a blue background"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSERVE_URL", server.grpc_url)
    monkeypatch.setenv("DIFFUSERVE_RETRIES", "0")
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command sets it, and would leave it to later tests


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def pixels(name: str) -> bytes:
    with PIL.Image.open(name) as opened:
        return opened.convert("RGB").tobytes()


def test_ctrl_c_stops_the_request_on_the_server(client: Client, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffuserve_client", "generate", PROMPT, "--steps", "150", "-n", "16"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        _until(lambda: client.status()["active"] > 0)
        os.kill(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "diffuserve: interrupted\n")
    _until(lambda: client.status()["active"] == 0)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_made_again_from_its_file() -> None:
    done("generate", PROMPT, "--steps", "6", "-n", "2", "-o", "first.png")
    done("generate", "--from-image", "first-1.png", "-o", "again.png")
    assert pixels("again.png") == pixels("first-1.png")
    assert Path("again.png").read_bytes() == Path("first-1.png").read_bytes(), "the same request makes the same file"
    done("generate", "--from-image", "first-1.png", "--seed", "1", "-o", "another.png")
    assert pixels("another.png") != pixels("first-1.png")


def test_a_picture_from_pictures_is_made_again() -> None:
    done("generate", PROMPT, "--steps", "6", "--seed", "3", "-o", "begin.png")
    PIL.Image.linear_gradient("L").resize((64, 64)).save("mask.png")
    made = ("inpaint", "begin.png", "mask.png")
    done(*made, "a small green ring", "--steps", "6", "--strength", "0.7", "--seed", "5", "-o", "first.webp")
    done(*made, "--from-image", "first.webp", "-o", "again.webp")
    assert pixels("again.webp") == pixels("first.webp")
    result = run("img2img", "begin.png", "--from-image", "first.webp")
    assert (result.exit_code, "made with a picture as mask_image, which is not in it" in result.stderr) == (2, True)


def test_models_and_health_of_the_server(server: Any) -> None:
    assert "shapes" in done("models")
    assert list(json.loads(done("models", "--json"))["checkpoints"]) == ["shapes"]
    assert done("health").startswith(f"{server.grpc_url}  serving  ")
    (told,) = json.loads(done("health", "--json"))["servers"]
    assert (told["state"], told["error"]) == ("serving", None)


@pytest.mark.parametrize("port", ["http_url", "metrics_url"])
def test_the_servers_other_ports_are_told_as_wrong(server: Any, port: str) -> None:
    url = getattr(server, port).removeprefix("http://").partition("/")[0]
    result = run("generate", PROMPT, "--url", url)
    assert (result.exit_code, result.stdout) == (3, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"diffuserve: cannot reach a server at {url} (")
    assert "host:port of its gRPC port" in line


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--steps", "150", "-n", "16", "--deadline-ms", "1"), 4, "deadline"),
        (("--checkpoint", "other"), 2, "other"),
        (("--sampler", "none such"), 2, "sampler"),
        (("--width", "65"), 2, "width"),
        (("--lora", "night"), 2, "exported without adapters"),
    ],
)
def test_what_the_server_refuses_is_one_line(options: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    result = run("generate", PROMPT, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def _until(happened: Any) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
