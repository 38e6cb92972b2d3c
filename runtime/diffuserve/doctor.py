"""What this machine can serve, and whether it can serve a deployment: one finding for each thing that is looked at.

Reading the machine is one half, judging what was read the other: the second is a pure function.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from diffuserve.engine_files import refusal
from diffuserve.gpu import RTX_CAPABILITIES, Driver, Gpu, GpuError, read_driver, read_gpus
from diffuserve.manifest import Deployment, Manifest
from diffuserve.profiles import EngineFacts
from diffuserve.spec import TARGET_DEVICES

__all__ = ["Finding", "Level", "Machine", "diagnose", "read_machine", "verdict"]

_GB: Final = 1e9
# CUDA 13, which TensorRT-RTX's package and the NGC images of this release are built with.
_NEEDED_CUDA: Final = (13, 0)
_NEEDED_SHM: Final = 256 << 20
_OLDEST_FOR_TENSORRT: Final = (7, 5)
# From which compute capability on tensor cores compute in a format.
_FORMATS: Final = {"fp16": (7, 0), "int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    topic: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found here; None where it is not here. `no_gpu` says why there are no GPUs."""

    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""
    driver: Driver | None = None
    tensorrt: str | None = None
    tensorrt_rtx: str | None = None
    onnxruntime: str | None = None
    triton: str | None = None
    shm_bytes: int = 0


def read_machine(nvml: Any = None, *, shm: Path = Path("/dev/shm"), libraries: Sequence[Path] | None = None) -> Machine:
    """Look at this machine. Nothing is started, and no GPU memory is taken."""
    gpus: tuple[Gpu, ...] = ()
    driver, no_gpu = None, ""
    try:
        gpus, driver = read_gpus(nvml), read_driver(nvml)
    except GpuError as error:
        no_gpu = str(error)
    return Machine(
        gpus=gpus,
        no_gpu=no_gpu,
        driver=driver,
        tensorrt=_library_version("libnvinfer.so", libraries) or _package_version("tensorrt"),
        tensorrt_rtx=_package_version("tensorrt_rtx"),
        onnxruntime=_package_version("onnxruntime"),
        triton=_triton(),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else 0,
    )


def diagnose(machine: Machine, deployment: Deployment | None = None) -> list[Finding]:
    """Judge the machine, and where a deployment is given, whether the machine can serve it."""
    findings = [*_driver_findings(machine), *(_card(gpu) for gpu in machine.gpus), _targets(machine)]
    findings += [_triton_finding(machine), _shm_finding(machine)]
    if deployment is not None:
        manifests = [deployment.manifest(name) for name in deployment.checkpoints]
        for manifest in manifests:
            findings += _manifest_findings(manifest, machine)
        findings += _memory_findings(manifests, machine)
    return findings


def verdict(capability: str) -> tuple[Level, str]:
    """What a card of that compute capability is good for."""
    pair = _pair(capability)
    if pair < _OLDEST_FOR_TENSORRT:
        return Level.PROBLEM, "too old for TensorRT 10 and later: use the target onnxruntime"
    targets = "tensorrt, tensorrt-rtx and onnxruntime" if capability in RTX_CAPABILITIES else "tensorrt and onnxruntime"
    formats = [name for name, oldest in _FORMATS.items() if pair >= oldest]
    return Level.OK, f"good for {targets}; {', '.join(formats)} in hardware"


def _driver_findings(machine: Machine) -> list[Finding]:
    if machine.driver is None:
        return [Finding(Level.NOTE, "driver", f"there is no GPU: {machine.no_gpu}")]
    found = f"{machine.driver.version}, for CUDA up to {machine.driver.cuda}"
    if _pair(machine.driver.cuda) < _NEEDED_CUDA:
        needed = ".".join(map(str, _NEEDED_CUDA))
        return [Finding(Level.PROBLEM, "driver", f"{found}; CUDA {needed} is needed: install driver 580 or later")]
    return [Finding(Level.OK, "driver", found)]


def _card(gpu: Gpu) -> Finding:
    level, text = verdict(gpu.capability)
    memory = f"{gpu.free_bytes / _GB:.1f} of {gpu.total_bytes / _GB:.1f} GB free"
    return Finding(level, "GPU", f"{gpu.name}, compute capability {gpu.capability}, {memory}: {text}")


def _targets(machine: Machine) -> Finding:
    """Which targets work here: those that can be served, and what can be exported for elsewhere."""
    served = ["onnxruntime-cpu"] if machine.onnxruntime else []
    capabilities = [gpu.capability for gpu in machine.gpus]
    if capabilities:
        served.append("onnxruntime")
        served += ["tensorrt"] if machine.tensorrt and _pair(capabilities[0]) >= _OLDEST_FOR_TENSORRT else []
        served += ["tensorrt-rtx"] if machine.tensorrt_rtx and capabilities[0] in RTX_CAPABILITIES else []
    text = f"this machine serves {', '.join(served) or 'none: install onnxruntime'}"
    if machine.tensorrt_rtx:
        text += f"; it builds tensorrt-rtx {machine.tensorrt_rtx} engines for other cards with --compute-capability"
    return Finding(Level.OK if served else Level.PROBLEM, "targets", text)


def _triton_finding(machine: Machine) -> Finding:
    if machine.triton is None:
        return Finding(
            Level.NOTE, "Triton", "not in /opt/tritonserver: `make serve` has one for the CPU, for development only"
        )
    return Finding(Level.OK, "Triton", machine.triton)


def _shm_finding(machine: Machine) -> Finding:
    size = f"/dev/shm has {machine.shm_bytes / _GB:.2f} GB"
    if machine.shm_bytes < _NEEDED_SHM:
        needed = f"{_NEEDED_SHM / _GB:.2f} GB"
        return Finding(Level.PROBLEM, "shared memory", f"{size}, and {needed} are needed: start with --shm-size=1g")
    return Finding(Level.OK, "shared memory", size)


def _manifest_findings(manifest: Manifest, machine: Machine) -> Iterable[Finding]:
    """Whether the checkpoint's engines run here."""
    topic = f"checkpoint {manifest.name}"
    on_gpu = TARGET_DEVICES.get(manifest.target) != "cpu"
    if on_gpu and not machine.gpus:
        yield Finding(Level.PROBLEM, topic, f"its target {manifest.target} needs a GPU, and there is none")
        return
    reasons = {
        _refusal(engine, machine)
        for engine in (component.engine for component in manifest.components.values())
        if engine is not None
    }
    for reason in sorted(reasons - {""}):
        yield Finding(Level.PROBLEM, topic, f"{manifest.target} engine: {reason}")
    if not reasons - {""}:
        yield Finding(Level.OK, topic, f"{manifest.target} in {manifest.precision} runs here")


def _refusal(engine: EngineFacts, machine: Machine) -> str:
    version = machine.tensorrt_rtx if engine.builder == "tensorrt-rtx" else machine.tensorrt
    if version is None:
        return f"{engine.builder} is not installed, and {engine.version} is needed"
    return refusal(engine, version=version, capability=machine.gpus[0].capability)


def _memory_findings(manifests: Sequence[Manifest], machine: Machine) -> Iterable[Finding]:
    """All checkpoints are loaded together, on the first GPU. A manifest without engines tells only its weights."""
    if not machine.gpus:
        return
    needed = {manifest.name: _device_bytes(manifest) for manifest in manifests}
    total, gpu = sum(needed.values()), machine.gpus[0]
    listed = ", ".join(f"{name} {size / _GB:.1f}" for name, size in needed.items())
    text = f"the deployment needs {total / _GB:.1f} GB ({listed}), and {gpu.name} has {gpu.total_bytes / _GB:.1f}"
    if total > gpu.total_bytes:
        yield Finding(Level.PROBLEM, "memory", f"{text}: export with fewer rows or smaller sizes")
    elif total > gpu.free_bytes:
        yield Finding(Level.NOTE, "memory", f"{text}, of which {gpu.free_bytes / _GB:.1f} are free")
    else:
        yield Finding(Level.OK, "memory", text)


def _device_bytes(manifest: Manifest) -> int:
    sizes = (one.engine.device_bytes if one.engine else one.bytes for one in manifest.components.values())
    return sum(sizes)


def _pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _package_version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except (ImportError, AttributeError, OSError):
        return None


def _library_version(name: str, folders: Sequence[Path] | None) -> str | None:
    """The version in a shared library's file name: Triton's images have TensorRT's library and no Python package."""
    given = [Path(one) for one in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if one]
    searched = folders if folders is not None else [Path("/usr/lib/x86_64-linux-gnu"), *given]
    for folder in searched:
        for path in sorted(folder.glob(f"{name}.*.*.*")):
            return path.name.removeprefix(f"{name}.")
    return None


def _triton(root: Path = Path("/opt/tritonserver")) -> str | None:
    """What the installed server calls itself."""
    named = os.environ.get("TRITONSERVER")
    if named:
        return named
    version = root / "TRITON_VERSION"
    if version.is_file():
        return re.sub(r"\s+", " ", version.read_text(encoding="utf-8")).strip()
    return str(root / "bin" / "tritonserver") if (root / "bin" / "tritonserver").is_file() else None
