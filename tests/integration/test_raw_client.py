"""The script of the docs that knows nothing but tritonclient, on the real server."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "docs" / "raw_client.py"


def test_it_makes_the_picture_that_the_client_makes(server: Any, client: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, server.grpc_url, "raw.png"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    heard = [re.sub(r"[\d.]+ s$", "... s", line) for line in done.stdout.splitlines()]
    steps = [f"step {step} of 20" for step in (5, 10, 15)]
    assert heard == ["accepted; expected in ... s", *steps, "raw.png, seed 7, ... s"]
    ours = client.generate("a large red circle on a blue background", steps=20, seed=7)
    assert (tmp_path / "raw.png").read_bytes() == ours.images[0].data


def test_a_refusal_is_the_servers_words(server: Any, tmp_path: Path) -> None:
    script = SCRIPT.read_text(encoding="utf-8").replace('"INT32", 20)', '"INT32", 999)')
    command = [sys.executable, "-c", script, server.grpc_url, "raw.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert "[invalid_argument] steps is 999, and must be from 1 to 150" in done.stderr


def test_it_imports_nothing_of_ours() -> None:
    names = set[str]()
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy", "tritonclient"}
