"""What the README and docs/client.md tell people to type is run, on the real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shapes_recipe.oracle import judge
from shapes_recipe.world import Scene

ROOT = Path(__file__).parents[2]


def example(name: str, page: str = "README.md") -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    match = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert match, f"{page} has no example {name}"
    return match[1]


def run(command: list[str], server: Any, folder: Path, script: str) -> str:
    """Run an example in an empty folder, with the ports of the test's server in place of the usual ones."""
    script = script.replace("localhost:8001", server.grpc_url).replace("localhost:8000", server.http_url)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DIFFUSERVE_URL": server.grpc_url}
    done = subprocess.run([*command, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "command", "file", "scene"),
    [
        ("python", [sys.executable, "-c"], "circle.png", Scene("large", "red", "circle", "blue")),
        ("shell", ["bash", "-euo", "pipefail", "-c"], "ring.png", Scene("small", "green", "ring", "white")),
        ("curl", ["bash", "-euo", "pipefail", "-c"], "diamond.png", Scene("large", "yellow", "diamond", "black")),
    ],
)
def test_an_example_makes_the_picture_it_names(
    server: Any, tmp_path: Path, name: str, command: list[str], file: str, scene: Scene
) -> None:
    script = example(name)
    assert scene.caption in script
    run(command, server, tmp_path, script)
    verdict = judge(Image.open(tmp_path / file))
    assert verdict.matches(scene), verdict


def test_the_librarys_first_example(server: Any, tmp_path: Path) -> None:
    run([sys.executable, "-c"], server, tmp_path, example("library", "docs/client.md"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle.png", *(f"ring-{n}.png" for n in range(8))]
    verdict = judge(Image.open(tmp_path / "circle.png"))
    assert verdict.matches(Scene("large", "red", "circle", "blue")), verdict


def test_the_librarys_asynchronous_example(server: Any, tmp_path: Path) -> None:
    said = run([sys.executable, "-c"], server, tmp_path, example("async", "docs/client.md"))
    assert re.fullmatch(r"expected in [\d.]+ s\nstep 4 of 12\nstep 8 of 12\n", said), said
    with Image.open(tmp_path / "ring.png") as opened:
        assert opened.size == (64, 64)


def test_the_commands_example(server: Any, tmp_path: Path) -> None:
    said = run(["bash", "-euo", "pipefail", "-c"], server, tmp_path, example("command", "docs/client.md"))
    lines = said.splitlines()
    assert [line.split("  ")[:2] for line in lines[:3:2]] == [["ring.png", "seed 7"], ["another.png", "seed 8"]]
    assert lines[1].startswith("larger.png  seed ")
    assert any(line.startswith("shapes: takes width ") for line in lines)
    for name in ("ring.png", "another.png"):
        verdict = judge(Image.open(tmp_path / name))
        assert verdict.matches(Scene("small", "green", "ring", "white")), (name, verdict)


def test_the_test_command_is_one_that_the_makefile_has() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(make \w+)\n```", text)
    assert command
    target = command[1].split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
