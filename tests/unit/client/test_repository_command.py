"""`diffuserve repository`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from diffuserve.repository.version import DeploymentVersion
from diffuserve_client._command import app
from diffuserve_client._repository import _size
from unit.fakes import write_deployment


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["repository", *map(str, arguments)])


def told(*arguments: object, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    root = tmp_path / "shop"
    write_deployment(root, "fake")
    (root / "checkpoints" / "fake" / "SHA256SUMS").write_text("")
    return root


def test_there_and_back(deployment: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    result = run("push", deployment, store, "--version", "v1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{store}: shop@v1, 4 files, ")
    listed = run("list", store)
    assert "shop" in listed.stdout
    assert "v1" in listed.stdout
    assert "1 versions" in listed.stdout
    assert told("list", store)["versions"][0]["checkpoints"] == ["fake"]
    assert run("pull", store, "shop", "--out", out).stdout.startswith(f"{out}: shop@v1 of 20")
    assert told("pull", store, tmp_path / "empty", "shop@v1", "--out", out)["fetched"] == 0
    assert told("verify", out) == {**told("verify", store, "shop"), "files": 3, "bytes": told("verify", out)["bytes"]}
    assert "all as it was written" in run("verify", out).stdout


def test_a_push_that_does_not_become_the_newest_says_so(deployment: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    told("push", deployment, store)
    again = run("push", deployment, store)
    assert "the newer" not in again.stdout
    manifest = next((store / "deployments" / "shop").iterdir())
    newer = replace(DeploymentVersion.from_json(manifest.read_text()), version="v2", created="2999-01-01T00:00:00Z")
    manifest.with_name("v2.json").write_text(newer.to_json())
    again = run("push", deployment, store)
    assert again.stdout.endswith("contents were there; `pull shop` gets the newer v2\n")


def test_exit_codes(deployment: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    (tmp_path / "file").write_text("")
    reports = told("push", deployment, store, tmp_path / "file" / "x", code=1)["destinations"]
    assert [bool(one["error"]) for one in reports] == [False, True]
    assert run("push", tmp_path / "nothing", store).exit_code == 1
    assert run("push", deployment, "ftp://x").exit_code == 2
    assert run("push", deployment, store, "--jobs", 0).exit_code == 2
    assert run("push", deployment).exit_code == 2
    missing = run("pull", store, "other", "--out", out)
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert missing.stderr.startswith(f"diffuserve: {store} has no other")
    assert run("list", tmp_path / "nowhere").exit_code == 2
    blob = max((store / "blobs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    blob.write_bytes(b"")
    damaged = run("verify", store)
    assert damaged.exit_code == 1
    assert "it has 0 bytes instead of" in damaged.stdout
    assert run("pull", store, "shop", "--out", out).exit_code == 1
    assert run("list", store).exit_code == 0
    next((store / "deployments" / "shop").iterdir()).write_text("{}")
    assert run("list", store).exit_code == 1


def test_bars_where_somebody_looks(deployment: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "diffuserve_client",
        "repository",
        "push",
        str(deployment),
        str(tmp_path / "store"),
    ]
    done = subprocess.run(command, stderr=follower, stdout=subprocess.PIPE, timeout=120, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    assert "━" in shown
    assert b"shop@" in done.stdout


def test_sizes_as_people_read_them() -> None:
    assert [_size(one) for one in (0, 999, 1000, 999_960, 48_229_353)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.0 MB",
        "48.2 MB",
    ]
    assert _size(12_345 * 10**12) == "12345.0 TB"
