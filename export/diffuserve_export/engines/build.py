"""ONNX file -> engine, in a process of its own, and kept by everything that decides it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from diffuserve.engine_files import ENGINE_FILE, FACTS_FILE, read_facts
from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import TensorShape
from diffuserve.profiles import EngineFacts, Profile
from diffuserve_export.engines.options import TENSORRT_RTX
from diffuserve_export.engines.profiles import tensor_shapes
from diffuserve_export.errors import ExportError
from diffuserve_export.processes import thrifty_environment

__all__ = ["EngineError", "EngineRequest", "engine_from_onnx", "onnx_files", "sha256_of"]

LOG_FILE: Final = "build.log"
INSPECTOR_FILE: Final = "inspector.json"
_FORMAT: Final = 1
_STAGING: Final = ".build-"


class EngineError(ExportError):
    """TensorRT refuses the graph, or the build died."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One engine to be built. `device` is the card's name for TensorRT, whose engines are for that card alone."""

    target: str
    version: str
    precision: str
    inputs: tuple[TensorShape, ...]
    profiles: tuple[Profile, ...]
    capabilities: tuple[str, ...]
    device: str
    workspace_bytes: int = 0

    def key(self, onnx_sha256: str) -> str:
        """The hash of everything that decides the engine."""
        facts = {**asdict(self), "onnx_sha256": onnx_sha256, "format": _FORMAT}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def engine_from_onnx(onnx: Path, request: EngineRequest, cache: Path, note: Callable[[str], None]) -> Path:
    """A folder of `cache` with the engine, its facts, the builder's log and, where a GPU is, the inspector's output.

    Whatever is there of an earlier build is taken only if it is whole and was made of the very same; else `note` is
    told why, and it is built again. Raises EngineError with what TensorRT said.
    """
    sha256 = sha256_of(onnx_files(onnx))
    folder = cache / request.key(sha256)
    if folder.exists():
        reason = reason_to_rebuild(folder, request, sha256)
        if not reason:
            return folder
        note(f"building an engine again, since {reason}")
    with _new_folder(folder) as staging:
        result = _build(onnx, request, staging, cache)
        facts = _facts(request, sha256, staging / ENGINE_FILE, result)
        (staging / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    return folder


def reason_to_rebuild(folder: Path, request: EngineRequest, onnx_sha256: str) -> str:
    """Why the engine in `folder` is not the one that is asked for; empty where it is."""
    try:
        facts = read_facts(folder)
        size = (folder / ENGINE_FILE).stat().st_size
    except (ComponentFailedError, OSError) as error:
        return f"{folder} is not whole ({error})"
    wanted = (request.target, request.version, request.precision, request.capabilities, onnx_sha256)
    found = (facts.builder, facts.version, facts.precision, facts.devices, facts.onnx_sha256)
    for what, want, have in zip(("builder", "version", "precision", "devices", "graph"), wanted, found, strict=True):
        if want != have:
            return f"the one in {folder} has another {what}: {have}, not {want}"
    if size != facts.bytes or sha256_of([folder / ENGINE_FILE]) != facts.sha256:
        return f"{folder / ENGINE_FILE} is damaged: it has {size} bytes, or other ones than the {facts.bytes} written"
    return ""


def _build(onnx: Path, request: EngineRequest, staging: Path, cache: Path) -> dict[str, Any]:
    """Run the builder's process. Its own messages go to a log, and its result comes back as a file."""
    job = staging / "job.json"
    job.write_text(json.dumps(_job(onnx, request, staging, cache)), encoding="utf-8")
    environment = thrifty_environment(POLYGRAPHY_USE_TENSORRT_RTX="1" if request.target == TENSORRT_RTX else "0")
    command = [sys.executable, "-m", "diffuserve_export.engines.builder", str(job)]
    with (staging / LOG_FILE).open("w", encoding="utf-8") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    result_file = staging / "result.json"
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
    if code < 0:
        raise EngineError(f"building an engine of {onnx} was ended by signal {-code}; it may have run out of memory")
    if code or "error" in result:
        last = (staging / LOG_FILE).read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise EngineError(f"{request.target} {request.version} refuses {onnx}: {result.get('error') or ''.join(last)}")
    job.unlink()
    result_file.unlink()
    return result


def _job(onnx: Path, request: EngineRequest, staging: Path, cache: Path) -> dict[str, Any]:
    # TensorRT-RTX keeps no timings: it does not time anything until it runs.
    timings = None if request.target == TENSORRT_RTX else cache / f"timings-{request.version}-{request.device}.bin"
    return {
        "parent": os.getpid(),
        "onnx": str(onnx.absolute()),
        "folder": str(staging),
        "profiles": [tensor_shapes(request.inputs, one) for one in request.profiles],
        "capabilities": [[int(part) for part in one.split(".")] for one in request.capabilities],
        "workspace_bytes": request.workspace_bytes,
        "timing_cache": str(timings).replace(" ", "-") if timings else None,
    }


def _facts(request: EngineRequest, onnx_sha256: str, engine: Path, result: dict[str, Any]) -> EngineFacts:
    memory = result["activation_bytes"]
    if len(memory) != len(request.profiles):
        raise EngineError(f"the builder told the memory of {len(memory)} of {len(request.profiles)} profiles")
    profiles = [replace(one, activation_bytes=size) for one, size in zip(request.profiles, memory, strict=True)]
    return EngineFacts(
        builder=request.target,
        version=request.version,
        precision=request.precision,
        devices=request.capabilities,
        profiles=tuple(profiles),
        onnx_sha256=onnx_sha256,
        sha256=sha256_of([engine]),
        bytes=engine.stat().st_size,
        build_seconds=result["seconds"],
        build_peak_bytes=result["peak_bytes"],
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when all went well, and is gone when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with _held(folder.parent):  # or another build could take the new folder for an abandoned one
            _remove_abandoned(folder.parent)
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder.parent))
            held.enter_context(_held(staging))
        try:
            yield staging
            if folder.exists():
                folder.rename(staging.with_name(f"{staging.name}-old"))
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(staging.with_name(f"{staging.name}-old"), ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """What builds that were killed left in `cache`: the folders that no process holds."""
    for path in cache.glob(f"{_STAGING}*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _held(path, wait=False):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder; the kernel lets go of it with the process. Raises BlockingIOError where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def onnx_files(onnx: Path) -> list[Path]:
    """The graph, and its weights where they lie beside it."""
    return [onnx, *sorted(path for path in onnx.parent.glob(f"{onnx.name}*") if path != onnx)]


def sha256_of(files: Sequence[Path]) -> str:
    """Of the files' bytes one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
