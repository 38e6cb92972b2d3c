"""What the container is made of and started with; linters look at the rest in `make check`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffuserve.server.__main__ import settings_from

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (only,) = compose["services"].values()
    return dict(only)


def last(instructions: list[tuple[str, str]], name: str) -> str:
    return [value for instruction, value in instructions if instruction == name][-1]


def test_the_image_is_ngcs_and_new_enough(instructions: list[tuple[str, str]], service: dict[str, Any]) -> None:
    tag = next(value for _, value in instructions if value.startswith("TRITON_TAG=")).removeprefix("TRITON_TAG=")
    assert last(instructions, "FROM") == "nvcr.io/nvidia/tritonserver:${TRITON_TAG}"
    assert tuple(map(int, tag.removesuffix("-py3").split("."))) >= (26, 7)
    assert service["build"]["args"]["TRITON_TAG"] == f"${{TRITON_TAG:-{tag}}}"


def test_it_runs_without_rights_and_without_compilers(instructions: list[tuple[str, str]]) -> None:
    assert last(instructions, "USER") == "1000:1000"
    installs = " ".join(value for instruction, value in instructions if instruction == "RUN")
    assert not re.search(r"apt|gcc|g\+\+|build-essential|nvcc|cmake", installs)
    assert "[runtime,gpu,tensorrt-rtx]" in installs


def test_the_command_is_one_that_the_server_takes(instructions: list[tuple[str, str]]) -> None:
    command = json.loads(last(instructions, "CMD"))
    assert command[:3] == ["python3", "-m", "diffuserve.server"]
    options, _ = settings_from(command[3:])
    assert options.deployment == Path("/deployment")
    assert options.host == "0.0.0.0"
    assert (options.http_port, options.grpc_port, options.metrics_port) == (8000, 8001, 8002)
    assert options.triton_arguments == ("--cuda-memory-pool-byte-size=0:1073741824",)


def test_everything_that_is_copied_exists_and_is_let_through(instructions: list[tuple[str, str]]) -> None:
    root, allowed = DEPLOY.parent, (DEPLOY / "Dockerfile.dockerignore").read_text()
    for instruction, value in instructions:
        if instruction == "COPY" and not value.startswith("--from"):
            for source in value.split()[:-1]:
                assert (root / source).exists()
                assert f"\n!{source}\n" in allowed


def test_compose_reserves_a_gpu_and_watches_the_server(service: dict[str, Any]) -> None:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["shm_size"] == "1gb"
    assert "/v2/models/diffusion/ready" in service["healthcheck"]["test"][-1]
    assert service["environment"] == {"DIFFUSERVE_SNAPSHOT_KEY": "${DIFFUSERVE_SNAPSHOT_KEY:-}"}
    (mount,) = service["volumes"]
    assert (mount["target"], mount["read_only"]) == ("/deployment", True)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
