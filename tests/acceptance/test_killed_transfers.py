"""Pushes and pulls that are killed in the middle, again and again: what was begun ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffuserve.repository import list_versions, verify_folder, verify_store
from diffuserve.repository.store import open_store

KILLS = 4


def killed_until_done(environment: dict[str, str], progress: Callable[[], int], arguments: list[str]) -> list[int]:
    """Run the command, killing it as soon as there is more than before; how much there was each time and at the end."""
    command = [sys.executable, "-m", "diffuserve_client", "repository", *arguments, "--jobs", "1"]
    seen = [0]
    for _ in range(KILLS):
        with subprocess.Popen(command, env={**os.environ, **environment}) as process:
            while process.poll() is None and progress() <= seen[-1]:
                time.sleep(random.uniform(0.0, 0.02))
            process.kill()
        if process.returncode == 0:
            break
        seen.append(progress())
    subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=600)
    return [*seen[1:], progress()]


@pytest.mark.parametrize("number", range(2))
def test_it_ends_whole(deployment: Path, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    url, out = f"s3://{s3.make_bucket()}/prod", tmp_path / "out"
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(url, 1)

    def blobs() -> int:
        return len(store.system.find(f"{store.root}/blobs"))

    def fetched() -> int:
        return sum(path.stat().st_size for path in (tmp_path.rglob("*") if not out.exists() else ()) if path.is_file())

    pushed = killed_until_done(s3.environment, blobs, ["push", str(deployment), url])
    assert len(list_versions(url).versions) == 1
    assert verify_store(url).problems == ()
    pulled = killed_until_done(s3.environment, fetched, ["pull", url, deployment.name, "--out", str(out)])
    assert len(pushed) > 2 < len(pulled), "killed in the middle more than once"
    assert verify_folder(out).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in (path for path in deployment.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        relative = path.relative_to(deployment)
        if path.name != "snapshot.key" and not any(part.startswith(".") for part in relative.parts):
            assert (out / relative).read_bytes() == path.read_bytes()
    print(f"killed with so many blobs sent: {pushed[:-1]} of {pushed[-1]}; with so many bytes fetched: {pulled[:-1]}")
