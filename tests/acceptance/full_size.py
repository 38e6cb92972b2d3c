"""Exports of full-size models for TensorRT-RTX: run, checked, and measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

from acceptance.watched_export import Run, watched_export
from diffuserve.manifest import Component, Deployment, Manifest
from diffuserve.spec import FAMILIES, VAE_DECODER, VAE_ENCODER
from diffuserve_export.engines.device import builder_version
from measure.tables import table

__all__ = ["check", "exported", "measured"]

BUDGET: Final = 24e9
OPTIONS: Final = ("TARGET=tensorrt-rtx", "PRECISION=fp16", "COMPUTE_CAPABILITY=89")
TOLERANCE: Final = {"fp32": 1e-4, "fp16": 1e-2}
#: Of the whole command, in the order of columns; what there is not takes no time.
PREPARED: Final = ("loading", "calibrating")


def exported(options: list[str], out: Path, name: str) -> tuple[Run, Manifest]:
    run = watched_export([*options, *OPTIONS, f"OUT={out}"])
    assert run.code == 0, run.output
    return run, Deployment.load(out).manifest(name)


def check(run: Run, manifest: Manifest, out: Path) -> None:
    """Every component is there, verified, and in an engine that takes what is served; all fit on one card."""
    assert list(manifest.components) == list(FAMILIES[manifest.family].components)
    check_verified(run, manifest)
    for name, component in manifest.components.items():
        check_engine(name, component, manifest)
        log = (out / "models" / component.model / "1" / "build.log").read_text(encoding="utf-8")
        assert "STRONGLY_TYPED" in log
    needed = [one.engine.device_bytes for one in manifest.components.values() if one.engine]
    assert 0 < sum(needed) <= BUDGET


def check_verified(run: Run, manifest: Manifest) -> None:
    """Every output of every component, at two shapes, within the tolerance of its precision."""
    found = run.errors()
    expected = sorted((name, one.name) for name, part in manifest.components.items() for one in part.outputs)
    assert sorted((name, output) for name, output, _ in found) == sorted(expected * 2)
    for (name, _, _), error in found.items():
        assert error <= TOLERANCE[manifest.components[name].precision]


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
    size = manifest.vae_size if name in (VAE_DECODER, VAE_ENCODER) else manifest.size
    for side in (size.min, size.opt, size.max):
        assert manifest.max_rows(name, side, side) >= 1


def measured(run: Run, manifest: Manifest) -> str:
    """What each component took, and what came of it, in Markdown."""
    heads = ("component", "load, s", "export, s", "verify, s", "build, s", "peak: graph, GB", "peak: engine, GB")
    rows = [row(run, name, one) for name, one in manifest.components.items()]
    engines = [one.engine for one in manifest.components.values() if one.engine]
    total = sum(one.bytes for one in engines)
    needed = sum(one.device_bytes for one in engines)
    notes = (
        f"{run.seconds:.0f} s in all, {run.peak / 1e9:.1f} GB of memory at most (all processes together), "
        f"{total / 1e9:.2f} GB of engines, {needed / 1e9:.1f} GB of a card's memory while served. "
        f"TensorRT-RTX {builder_version('tensorrt-rtx')}, compute capability 8.9; "
        f"{os.cpu_count()} cores of {processor()}. Load: with calibration. Context: of the profile that needs most."
    )
    return "\n".join((table((*heads, "engine, MB", "context, GB", "relative error"), rows), "", notes))


def row(run: Run, name: str, component: Component) -> tuple[str, ...]:
    stages, engine = run.of(name), component.engine
    assert engine is not None
    graph = max(one.peak for key, one in stages.items() if key != "building")
    prepared = sum(stages[key].seconds for key in PREPARED if key in stages)
    error = max(error for (component_name, _, _), error in run.errors().items() if component_name == name)
    return (
        f"{name}, {component.precision}",
        f"{prepared:.0f}",
        *(f"{stages[key].seconds:.0f}" for key in ("exporting", "verifying", "building")),
        f"{graph / 1e9:.1f}",
        f"{stages['building'].peak / 1e9:.1f}",
        f"{engine.bytes / 1e6:.0f}",
        f"{max(one.activation_bytes for one in engine.profiles) / 1e9:.2f}",
        f"{error:.1e}",
    )


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
