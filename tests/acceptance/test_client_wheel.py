"""The wheel with nothing but the client, in an environment that was empty: how long it takes, and that it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOST_INSTALL_S = 10.0
MOST_IMPORT_S = 0.5
TRIES = 2  # what else the machine does can only make it slower, so the shortest counts
SLOW = {"grpc", "tritonclient", "numpy", "PIL", "rich", "typer", "pydantic"}

# pip's own settings, which name indexes, stay; Python's would bring this checkout's packages.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=ENVIRONMENT, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def say(what: str) -> None:
    print(f"\n{what}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The environment's bin, and the seconds that pip took, with every wheel at hand and nothing to ask an index."""
    folder = tmp_path_factory.mktemp("environment")
    asked = ("-c", ROOT / "constraints.txt", f"{wheel}[client]")
    run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder / "wheels", *asked)
    seconds = []
    for number in range(TRIES):
        python = folder / str(number) / "bin" / "python"
        run(sys.executable, "-m", "venv", folder / str(number))
        started = time.monotonic()
        run(python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", folder / "wheels", *asked)
        seconds.append(time.monotonic() - started)
    say(f"pip install diffuserve[client]: {', '.join(f'{one:.1f}' for one in seconds)} s")
    return python.parent, min(seconds)


def test_it_is_installed_quickly(installed: tuple[Path, float]) -> None:
    assert installed[1] < MOST_INSTALL_S


def test_nothing_of_the_server_comes_with_it(installed: tuple[Path, float]) -> None:
    listed = run(installed[0] / "python", "-m", "pip", "list", "--format", "freeze").stdout
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    say(f"{len(names)} packages: {', '.join(sorted(names))}")
    assert {"diffuserve", "tritonclient", "grpcio", "pillow"} <= names
    heavy = ("torch", "onnx", "tensorrt", "nvidia", "transformers", "tokenizers", "diffusers", "scipy", "matplotlib")
    assert [name for name in names if name.startswith(heavy)] == []


def test_it_is_imported_quickly_and_loads_nothing_that_waits_for_a_request(installed: tuple[Path, float]) -> None:
    python = installed[0] / "python"
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        run(python, "-c", "import diffuserve_client")
        seconds.append(time.monotonic() - started)
    told = run(python, "-X", "importtime", "-c", "import diffuserve_client").stderr
    rows = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)", told)
    (total,) = (int(cumulative) / 1e6 for _, cumulative, _, name in rows if name == "diffuserve_client")
    say(f"import diffuserve_client: {total:.3f} s, {min(seconds):.3f} s with Python's own start")
    assert min(seconds) < MOST_IMPORT_S
    assert {name.partition(".")[0] for *_, name in rows} & SLOW == set()


def test_the_commands_explain_themselves(installed: tuple[Path, float]) -> None:
    started = time.monotonic()
    shown = run(installed[0] / "diffuserve", "--help").stdout
    say(f"diffuserve --help: {time.monotonic() - started:.2f} s")
    for command in ("generate", "models", "bench", "doctor"):
        assert command in shown
        run(installed[0] / "diffuserve", command, "--help")


def test_real_requests_succeed(installed: tuple[Path, float], server: Any, client: Any, tmp_path: Path) -> None:
    asked = ("generate", "a small green ring on a white background", "--seed", "3", "--steps", "4", "-o", "ring.png")
    run(installed[0] / "diffuserve", *asked, "--url", server.grpc_url, cwd=tmp_path)
    expected = client.generate("a small green ring on a white background", seed=3, steps=4).images[0].data
    assert _pixels(tmp_path / "ring.png") == _decoded(expected)
    told = run(
        *(installed[0] / "diffuserve", "bench", "--url", server.grpc_url),
        *("--requests", "2", "--warm-up", "0", "--steps", "2"),
        cwd=tmp_path,
    ).stdout
    assert "2 of 2 requests done; no errors" in told


def test_what_needs_another_extra_says_which(installed: tuple[Path, float], tmp_path: Path) -> None:
    command = [str(installed[0] / "diffuserve"), "bench", "--plot", "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "diffuserve: this needs matplotlib, which is not installed; pip install 'diffuserve[tools]'\n",
    )


def _pixels(path: Path) -> bytes:
    import PIL.Image

    with PIL.Image.open(path) as image:
        return image.tobytes()


def _decoded(data: bytes) -> bytes:
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.tobytes()
