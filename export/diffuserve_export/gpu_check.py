"""`make gpu-check`: build for the GPU of this machine, compare with ONNX Runtime, measure, write a report.

What it compares with is the checkpoint in float32 on the CPU, where every graph was verified against torch.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from diffuserve.doctor import diagnose, read_machine
from diffuserve.engine_files import ENGINE_FILE
from diffuserve.engine_session import EngineSession
from diffuserve.manifest import Component, Deployment, Manifest, TensorShape
from diffuserve.onnx_session import open_session
from diffuserve.profiles import ROWS, Profile
from diffuserve.spec import CLIP_SKIP, UNET
from diffuserve_export.engines.options import TENSORRT, TENSORRT_RTX
from diffuserve_export.engines.profiles import ROW_BUCKETS
from diffuserve_export.errors import ExportError, VerificationError
from diffuserve_export.export import export_checkpoint
from diffuserve_export.options import ExportOptions

__all__ = ["compare", "example", "latencies", "main", "report_text"]

Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]

_REFERENCE: Final = "onnxruntime-cpu"
_PACKAGES: Final = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
_TOLERANCE: Final = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
_DTYPES: Final = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
_REPEATS: Final = 20
_WARMUPS: Final = 3


@dataclass(frozen=True, slots=True)
class Compared:
    """The largest difference of one output over the reference's largest value, at some number of rows."""

    component: str
    output: str
    rows: int
    error: float


def main(
    checkpoint: Annotated[str, typer.Option(help="a diffusers folder or hub id")],
    target: Annotated[str, typer.Option(help=f"{TENSORRT} or {TENSORRT_RTX}")] = TENSORRT_RTX,
    precision: Annotated[str, typer.Option(help="of the engines")] = "fp32",
    out: Annotated[Path, typer.Option(help="where deployments and the report go")] = Path("build/gpu-check"),
) -> None:
    """Check engines on this machine's GPU; the exit code is 1 where one computes something else."""
    try:
        machine = read_machine()
        if not machine.gpus:
            raise ExportError(f"there is no GPU to check: {machine.no_gpu}")
        findings = [f"{one.level.value}: {one.topic}: {one.text}" for one in diagnose(machine)]
        reference, engines = _exported(checkpoint, target, precision, out)
        compared, measured = _checked(reference, engines)
    except ExportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    text = report_text(engines, findings, compared, measured)
    (out / "report.md").write_text(text, encoding="utf-8")
    typer.echo(text)
    tolerance = _TOLERANCE.get(precision, max(_TOLERANCE.values()))
    if any(not one.error <= tolerance for one in compared):  # written so that a NaN fails
        typer.echo(f"error: an output is off by more than {tolerance:g}", err=True)
        raise typer.Exit(1)


def _exported(checkpoint: str, target: str, precision: str, out: Path) -> tuple[Path, Path]:
    """The folders of the reference deployment and of the one with engines."""
    folders = out / _REFERENCE, out / f"{target}-{precision}"
    for folder, where, what in zip(folders, (_REFERENCE, target), ("fp32", precision), strict=True):
        export_checkpoint(ExportOptions(checkpoint=checkpoint, out=folder, name="x", target=where, precision=what))
    return folders


def _checked(reference: Path, engines: Path) -> tuple[list[Compared], dict[int, float]]:
    """Every engine against its graph, one at a time, and the UNet's latencies."""
    manifest, expected = Deployment.load(engines).manifest("x"), Deployment.load(reference).manifest("x")
    compared, measured = list[Compared](), dict[int, float]()
    for name, component in manifest.components.items():
        session = _engine(engines, manifest, component)
        graph = _graph(reference, expected.components[name])
        compared += compare(name, component, graph, session.run)
        if name == UNET:
            measured = latencies(component, session.run)
        del session
        torch.cuda.empty_cache()
    return compared, measured


def _engine(root: Path, manifest: Manifest, component: Component) -> EngineSession:
    engine = (root / "models" / component.model / "1" / ENGINE_FILE).read_bytes()
    package = importlib.import_module(_PACKAGES[manifest.target])
    return EngineSession(package, engine, torch.device("cuda", 0))


def _graph(root: Path, component: Component) -> Run:
    session: Any = open_session(root / "models" / component.model / "1" / "model.onnx", 0)

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [one.name for one in component.outputs]
        arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


def compare(name: str, component: Component, reference: Run, engine: Run) -> list[Compared]:
    """Run both on the same inputs, at the smallest size, with one row and with three."""
    results = []
    for rows in sorted({1, min(3, _profiles(component)[-1].sides[ROWS].max)}):
        inputs = example(component.inputs, _profiles(component)[-1], rows, size="min")
        expected = reference(
            {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}
        )
        found = engine(_on_device(inputs))
        for output, want in expected.items():
            got = found[output].float().cpu()
            if got.shape != want.shape:
                raise VerificationError(f"{name}: {output} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
            scale = max(float(want.abs().max()), 1e-12)
            results.append(Compared(name, output, rows, float((got - want).abs().max()) / scale))
    return results


def latencies(component: Component, engine: Run) -> dict[int, float]:
    """Median seconds of a call by its rows, at the size that the first profile is tuned for."""
    profile = max(_profiles(component), key=lambda one: one.sides[ROWS].max)
    most = profile.sides[ROWS].max
    measured = {}
    for rows in (1, *(bucket for bucket in ROW_BUCKETS if bucket <= most)):
        inputs = _on_device(example(component.inputs, profile, rows, size="opt"))
        seconds = []
        for repeat in range(_WARMUPS + _REPEATS):
            started = time.perf_counter()
            engine(inputs)  # returns when the outputs are complete
            if repeat >= _WARMUPS:
                seconds.append(time.perf_counter() - started)
        measured[rows] = statistics.median(seconds)
    return measured


def example(inputs: Sequence[TensorShape], profile: Profile, rows: int, *, size: str) -> dict[str, torch.Tensor]:
    """Seeded inputs in the engine's types. `size` is min or opt, of every side but the rows."""
    generator = torch.Generator().manual_seed(7)
    sides = {name: rows if name == ROWS else getattr(side, size) for name, side in profile.sides.items()}
    drawn = {}
    for one in inputs:
        shape = [sides[side] if isinstance(side, str) else side for side in one.shape]
        if one.datatype.startswith("INT"):
            most = 2 if one.name == CLIP_SKIP else 100  # any encoder has a layer that can be left out
            drawn[one.name] = torch.randint(0, most, shape, generator=generator, dtype=torch.int32)
        else:
            scale = 900.0 if one.name == "timestep" else 1.0
            drawn[one.name] = (torch.rand(shape, generator=generator) * scale).to(_DTYPES[one.datatype])
    return drawn


def _profiles(component: Component) -> tuple[Profile, ...]:
    """The profiles that take a range of shapes, small pictures first."""
    if component.engine is None:
        raise VerificationError(f"{component.model} has no engine: give the target {TENSORRT} or {TENSORRT_RTX}")
    return tuple(one for one in component.engine.profiles if not one.is_static)


def _on_device(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def report_text(
    engines: Path, findings: Sequence[str], compared: Sequence[Compared], measured: Mapping[int, float]
) -> str:
    """The report, in Markdown."""
    manifest = Deployment.load(engines).manifest("x")
    lines = [f"# {manifest.source} for {manifest.target} in {manifest.precision}", "", "## Machine", ""]
    lines += [f"- {finding}" for finding in findings]
    lines += [
        "",
        "## Engines",
        "",
        "| component | version | for | MB | activations, MB | build, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, component in manifest.components.items():
        if (facts := component.engine) is not None:
            activations = ", ".join(f"{one.activation_bytes / 1e6:.0f}" for one in facts.profiles)
            row = (name, facts.version, " ".join(facts.devices), f"{facts.bytes / 1e6:.0f}", activations)
            lines.append(f"| {' | '.join(row)} | {facts.build_seconds:.0f} |")
    lines += [
        "",
        "## Against ONNX Runtime in float32",
        "",
        "| component | output | rows | relative error |",
        "|---|---|---|---|",
    ]
    lines += [f"| {one.component} | {one.output} | {one.rows} | {one.error:.1e} |" for one in compared]
    lines += ["", "## The UNet's latency", "", "| rows | ms | ms a row |", "|---|---|---|"]
    lines += [f"| {rows} | {seconds * 1e3:.2f} | {seconds * 1e3 / rows:.2f} |" for rows, seconds in measured.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
