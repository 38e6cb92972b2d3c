"""Full-size models with random weights become TensorRT-RTX engines by one command each, in bounded memory and time.

Needs two cores, 24 GB and 20 GB of disk, and no GPU. What was measured goes to build/acceptance/<family>.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from conftest import ROOT
from diffuserve.manifest import Component, Deployment, Manifest
from diffuserve.spec import FAMILIES, VAE_DECODER, VAE_ENCODER

RESULTS = ROOT / "build" / "acceptance"
MOST_MEMORY = 20e9
MOST_SECONDS = 1800
BUDGET = 24e9
STAGE = re.compile(r" *\d+ s  (\w+) (\w+)")
VERIFIED = re.compile(r"│ (\w+) +│ (\w+) +│ ([\dx ]+?) +│ ([\d.e-]+) +│")


@dataclass
class Stage:
    """One stage of one component: its seconds, and the most memory that all processes held together meanwhile."""

    component: str
    name: str
    seconds: float = 0.0
    peak: int = 0


@dataclass
class Run:
    """One `make export`, watched from outside."""

    stages: list[Stage] = field(default_factory=lambda: [Stage("", "starting")])
    lines: list[str] = field(default_factory=list)
    code: int = -1

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.stages)

    @property
    def peak(self) -> int:
        return max(one.peak for one in self.stages)

    @property
    def output(self) -> str:
        return "".join(self.lines)


def resident(process: psutil.Process) -> int:
    """Bytes of the process and all that it started. What several of them share counts for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def watched(command: list[str], environment: dict[str, str]) -> Run:
    """Run `command`; its lines tell when a stage begins, and another thread looks at its memory five times a second."""
    run, ended = Run(), threading.Event()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:

        def sample() -> None:
            while not ended.wait(0.2):
                run.stages[-1].peak = max(run.stages[-1].peak, resident(psutil.Process(process.pid)))

        sampler = threading.Thread(target=sample)
        sampler.start()
        started = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            run.lines.append(line)
            if match := STAGE.match(line):
                now = time.monotonic()
                run.stages[-1].seconds, started = now - started, now
                run.stages.append(Stage(match[2], match[1]))
        run.stages[-1].seconds = time.monotonic() - started
        ended.set()
        sampler.join()
    run.code = process.returncode
    return run


def table(run: Run, manifest: Manifest) -> str:
    """What each component took, and what came of it, in Markdown."""
    rows = [
        "| component | load, calibrate, s | export, s | verify, s | build, s | peak, GB: graph | engine "
        "| engine, MB | contexts, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, component in manifest.components.items():
        stages = {one.name: one for one in run.stages if one.component == name}
        seconds = {key: one.seconds for key, one in stages.items()}
        assert component.engine is not None
        graph = max(one.peak for key, one in stages.items() if key != "building")
        contexts = " + ".join(f"{one.activation_bytes / 1e9:.2f}" for one in component.engine.profiles)
        prepared = seconds["loading"] + seconds.get("calibrating", 0.0)
        times = f"{prepared:.0f} | {seconds['exporting']:.0f} | {seconds['verifying']:.0f} | {seconds['building']:.0f}"
        memory = f"{graph / 1e9:.1f} | {stages['building'].peak / 1e9:.1f}"
        rows.append(
            f"| {name}, {component.precision} | {times} | {memory} | {component.bytes / 1e6:.0f} | {contexts} |"
        )
    total = sum(one.bytes for one in manifest.components.values())
    rows.append(f"| all: {run.seconds:.0f} s, {run.peak / 1e9:.1f} GB, {total / 1e9:.2f} GB of engines |")
    return "\n".join(rows) + "\n"


@pytest.fixture
def folders(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """The deployment and the engines' cache, gone afterwards: together they hold each engine once."""
    root = ROOT / "build" / "acceptance" / str(request.node.callspec.id)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    yield root / "deployment", root / "cache"
    shutil.rmtree(root)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_full_size_export(family: str, folders: tuple[Path, Path]) -> None:
    out, cache = folders
    options = ["RANDOM_WEIGHTS=1", "TARGET=tensorrt-rtx", "PRECISION=fp16", "COMPUTE_CAPABILITY=89"]
    run = watched(["make", "export", f"FAMILY={family}", *options, f"OUT={out}"], {"DIFFUSERVE_CACHE": str(cache)})
    assert run.code == 0, run.output
    manifest = Deployment.load(out).manifest(family)
    (RESULTS / f"{family}.md").write_text(table(run, manifest), encoding="utf-8")
    print(f"\n{run.output}\n{table(run, manifest)}")  # noqa: T201
    assert run.peak <= MOST_MEMORY
    assert run.seconds <= MOST_SECONDS
    assert list(manifest.components) == list(FAMILIES[family].components)
    check_verified(run.output, manifest)
    for name, component in manifest.components.items():
        check_engine(name, component, manifest)
        log = (out / "models" / component.model / "1" / "build.log").read_text(encoding="utf-8")
        assert "STRONGLY_TYPED" in log
    needed = [one.engine.device_bytes for one in manifest.components.values() if one.engine]
    assert 0 < sum(needed) <= BUDGET


def check_verified(output: str, manifest: Manifest) -> None:
    """Every output of every component, at two shapes, within the tolerance of its precision."""
    found = {(match[1], match[2], match[3]): float(match[4]) for match in VERIFIED.finditer(output)}
    expected = sorted((name, one.name) for name, part in manifest.components.items() for one in part.outputs)
    assert sorted((name, output) for name, output, _ in found) == sorted(expected * 2)
    for (name, _, _), error in found.items():
        assert error <= (1e-2 if manifest.components[name].precision == "fp16" else 1e-4)


def check_engine(name: str, component: Component, manifest: Manifest) -> None:
    """The manifest knows what the engine is for, and takes calls of every size that is served."""
    facts = component.engine
    assert facts is not None
    wide = FAMILIES[manifest.family].wide_vae and name in (VAE_DECODER, VAE_ENCODER)
    assert component.precision == facts.precision == ("fp32" if wide else "fp16")
    assert (facts.builder, facts.devices) == ("tensorrt-rtx", ("8.9",))
    assert facts.build_seconds > 0
    assert facts.build_peak_bytes > facts.bytes > 0
    assert all(one.activation_bytes > 0 for one in facts.profiles)
    for side in (manifest.size.min, manifest.size.opt, manifest.size.max):
        assert manifest.max_rows(name, side, side) >= 1
