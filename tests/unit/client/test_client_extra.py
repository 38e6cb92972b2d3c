"""What the extra `client` installs is all that the client needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from unit.client.fake_triton import FakeTriton

#: Runs the command where everything else that this environment holds seems not to be installed.
PROGRAM = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = set(json.loads(sys.argv.pop(1)))
sys.meta_path.insert(0, Absent())
from diffuserve_client._command import app
app()
"""


def installed_with(name: str, extra: str) -> set[str]:
    """The distributions that come with one and its extra, itself included."""
    todo, seen = [(canonicalize_name(name), extra), (canonicalize_name(name), "")], set[tuple[str, str]]()
    while todo:
        if (one := todo.pop()) in seen:
            continue
        seen.add(one)
        for requirement in map(Requirement, requires(one[0]) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": one[1]}):
                needed = canonicalize_name(requirement.name)
                todo += [(needed, ""), *((needed, more) for more in requirement.extras)]
    return {one for one, _ in seen}


def test_the_command_runs_on_nothing_else(fake: FakeTriton, tmp_path: Path) -> None:
    """Each command that talks to a server, in an environment where the rest of this one is absent."""
    there = installed_with("diffuserve", "client")
    assert {"tritonclient", "grpcio", "pillow", "typer"} <= there
    absent = {
        package
        for package, distributions in packages_distributions().items()
        if not {canonicalize_name(one) for one in distributions} & there
    }
    assert {"torch", "onnxruntime", "diffusers", "matplotlib", "yaml"} <= absent
    assert "numpy" not in absent
    for arguments in (["generate", "a", "-o", "a.png", "--url", fake.url], ["--help"], ["bench", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(sorted(absent)), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
