"""Manifests of stored versions: what they say comes back, and what nobody should have written is refused."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.errors import InvalidArgumentError
from diffuserve.repository import version as version_module
from diffuserve.repository.version import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Blob,
    DeploymentVersion,
    path_problem,
    split_reference,
)

CREATED = "2026-01-02T03:04:05Z"
FILES = {"deployment.json": Blob("0" * 64, 3), "models/a/1/model.onnx": Blob("1" * 64, 5), "b": Blob("1" * 64, 5)}


def of(files: dict[str, Blob], version: str | None = None) -> DeploymentVersion:
    return DeploymentVersion.of("shapes", version, CREATED, ("shapes",), files)


def written(**changes: Any) -> str:
    """A manifest with these facts changed, and a digest that fits it."""
    facts = {**json.loads(of(FILES).to_json()), **changes}
    facts.pop("digest")
    return json.dumps({**facts, "digest": version_module._digest(facts)})


def test_a_manifest_comes_back() -> None:
    one = of(FILES)
    assert DeploymentVersion.from_json(one.to_json()) == one
    assert one.bytes == 13
    assert list(one.blobs.items()) == [
        (Blob("1" * 64, 5), ["b", "models/a/1/model.onnx"]),
        (Blob("0" * 64, 3), ["deployment.json"]),
    ]


def test_the_same_files_are_the_same_version() -> None:
    assert of(FILES).version == of(dict(reversed(FILES.items()))).version
    assert of(FILES).version != of({**FILES, "b": Blob("2" * 64, 5)}).version
    assert of(FILES, "one").content == of(FILES, "two").content


def test_any_flipped_byte_of_a_manifest_is_found() -> None:
    data = of({"b": Blob("1" * 64, 5)}).to_json().rstrip().encode()
    for position in range(len(data)):
        changed = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        if json_or_none(changed) == json.loads(data):  # white space
            continue
        with pytest.raises(ValueError, match=r"."):
            DeploymentVersion.from_json(changed.decode())


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../outside",
        "models/../../outside",
        "models/..",
        "models//model",
        "./model",
        ".ssh/authorized_keys",
        "models/.hidden",
        "models\\..\\outside",
        "c:/windows",
        "file:///etc/passwd",
        "a\x00b",
        "a\nb",
        "snapshot.key",
        "\ud800",
        "/".join("abcdefghijklmnopq"),
        "x" * 513,
    ],
)
def test_no_path_of_a_manifest_leaves_its_folder(path: str) -> None:
    assert path_problem(path)
    with pytest.raises(ValueError, match="path"):
        DeploymentVersion.from_json(written(files={path: {"sha256": "0" * 64, "bytes": 1}}))


@given(st.text(st.sampled_from("./\\a:~\x00 -"), max_size=12) | st.text(max_size=30))
def test_whatever_path_is_taken_stays_inside(path: str) -> None:
    if not path_problem(path):
        parts = PurePosixPath(path).parts
        assert "/".join(parts) == path
        assert not PurePosixPath(path).is_absolute()
        assert not any(part.startswith(".") for part in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format is 2, and 1 is read"),
        ({"name": "../other"}, r"\.\./other"),
        ({"version": "a/b"}, "a/b"),
        ({"created": "yesterday"}, "yesterday"),
        ({"checkpoints": "shapes"}, "no checkpoints"),
        ({"checkpoints": ["../x"]}, r"\.\./x"),
        ({"files": {}}, f"1 to {MAX_FILES} files"),
        ({"files": []}, f"1 to {MAX_FILES} files"),
        ({"files": {"a": {"sha256": "0" * 63, "bytes": 1}}}, "0000"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": -1}}}, "-1 bytes"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": True}}}, "True bytes"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": 1 << 60}}}, "must have 0 to"),
        ({"files": {"a": {"sha256": "0" * 64}}}, "lacks"),
        ({"files": {"a": [1]}}, "lacks"),
        ({"files": {one: {"sha256": "0" * 64, "bytes": 1} for one in ("a", "a/b")}}, "'a' is a file, and the folder"),
        ({"files": {str(one): {"sha256": "0" * 64, "bytes": 1} for one in range(MAX_FILES + 1)}}, "1 to"),
    ],
)
def test_a_manifest_within_its_limits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeploymentVersion.from_json(written(**changes))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, " " * (MAX_MANIFEST_BYTES + 1)])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        DeploymentVersion.from_json(text)


def test_references() -> None:
    assert split_reference("shapes") == ("shapes", None)
    assert split_reference("shapes@v1.2") == ("shapes", "v1.2")
    for reference in ("", "@v1", "shapes@", "a/b", "a@b@c", "../a", "a@../b", "x" * 65):
        with pytest.raises(InvalidArgumentError, match="choose another"):
            split_reference(reference)
