"""Files that say what is deployed: whatever is in them, they are read or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffuserve.manifest import Deployment, Manifest
from unit.fakes import write_deployment


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        '{"format_version": 1}',
        '{"format_version": 1, "checkpoints": 5}',
        '{"format_version": 1, "checkpoints": "one"}',
        '{"format_version": 1, "checkpoints": [1]}',
        '{"format_version": 2, "checkpoints": ["one"]}',
    ],
)
def test_what_is_no_list_of_checkpoints(tmp_path: Path, text: str) -> None:
    (tmp_path / Deployment.FILE).write_text(text)
    with pytest.raises(ValueError, match="names no checkpoint in format 1; export again"):
        Deployment.load(tmp_path)


def test_what_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / Deployment.FILE).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        Deployment.load(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"components": [1]},
        {"components": {"unet": 5}},
        {"conditioning": []},
        {"colours": {"weights": 5, "bias": []}},
        {"size": None},
    ],
)
def test_a_manifest_of_another_kind(tmp_path: Path, changed: dict[str, Any]) -> None:
    manifest = write_deployment(tmp_path, "fake").manifest("fake")
    text = json.dumps({**json.loads(manifest.to_json()), **changed})
    with pytest.raises(ValueError, match="the manifest lacks or has too much"):
        Manifest.from_json(text)
