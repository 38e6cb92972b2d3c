"""The process that builds one engine: `python -m diffuserve_export.engines.builder job.json`.

Polygraphy drives TensorRT, or TensorRT-RTX where POLYGRAPHY_USE_TENSORRT_RTX is 1; it reads that once, at import,
which is one reason for a process of its own. It writes result.json beside the engine.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polygraphy import config as polygraphy_config
from polygraphy.backend import trt as polygraphy_trt
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import util as polygraphy_util

from diffuserve_export.processes import end_with_parent

if TYPE_CHECKING:
    import tensorrt as trt
elif polygraphy_config.USE_TENSORRT_RTX:
    import tensorrt_rtx as trt
else:
    import tensorrt as trt

__all__ = ["main"]

_GPU_DEVICE: Final = Path("/dev/nvidiactl")
_ACTIVATION: Final = re.compile(r"Total Activation Memory: (\d+) bytes")


class Listener(trt.ILogger):
    """Writes what the builder says, and keeps what is read out of it: errors, and each profile's memory.

    Without a GPU no engine can be opened to be asked, but its builder says what each profile's context will take.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.activation_bytes: list[int] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)
        if match := _ACTIVATION.search(msg):
            self.activation_bytes.append(int(match[1]))
        if severity != trt.ILogger.Severity.VERBOSE:
            sys.stdout.write(f"{msg}\n")


def main(path: str) -> int:
    """Build what the job asks for; the exit code is 1 where it cannot be built."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    end_with_parent(job["parent"])
    folder = Path(job["folder"])
    listener = Listener()
    polygraphy_util.TRT_LOGGER = listener  # Polygraphy makes one logger of its own where there is none yet
    try:
        result = _build(job, folder, listener)
    except Exception as error:  # Polygraphy's own, and whatever the bindings raise
        result = {"error": _one_line(listener.errors[0] if listener.errors else str(error))}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 1 if "error" in result else 0


def _build(job: dict[str, Any], folder: Path, listener: Listener) -> dict[str, Any]:
    started = time.monotonic()
    flags = trt.NetworkDefinitionCreationFlag.__members__
    # TensorRT 11 knows nothing else and has dropped the flag.
    loader = polygraphy_trt.NetworkFromOnnxPath(job["onnx"], strongly_typed="STRONGLY_TYPED" in flags)
    builder, network, parser = loader()
    _check_profiles(network, job["profiles"])
    config = _config(job)
    engine = polygraphy_trt.EngineBytesFromNetwork(
        (builder, network, parser), config=config, save_timing_cache=job["timing_cache"]
    )()
    with (folder / "model.plan").open("wb") as stream:
        stream.write(engine)
    seconds = time.monotonic() - started
    activation_bytes = _inspect(engine, folder, listener, len(job["profiles"]))
    return {"activation_bytes": activation_bytes, "seconds": round(seconds, 1), "peak_bytes": _peak_bytes()}


def _config(job: dict[str, Any]) -> Any:
    """Polygraphy's loader of the builder's configuration."""
    options: dict[str, Any] = {
        "profiles": [_profile(shapes) for shapes in job["profiles"]],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if job["workspace_bytes"]:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job["workspace_bytes"]}
    if polygraphy_config.USE_TENSORRT_RTX:
        capabilities = [(major, minor) for major, minor in job["capabilities"]]
        return CreateConfigRTX(compute_capabilities=capabilities, **options)
    return polygraphy_trt.CreateConfig(load_timing_cache=job["timing_cache"], **options)


def _profile(shapes: dict[str, Sequence[Sequence[int]]]) -> Any:
    profile = polygraphy_trt.Profile()
    for name, (low, opt, high) in shapes.items():
        profile.add(name, min=tuple(low), opt=tuple(opt), max=tuple(high))
    return profile


def _check_profiles(network: trt.INetworkDefinition, profiles: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a profile has other tensors than the graph, or sides that the graph has fixed."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    graph = {one.name: tuple(one.shape[axis] for axis in range(len(one.shape))) for one in tensors}
    for index, profile in enumerate(profiles):
        if profile.keys() != graph.keys():
            raise ValueError(f"profile {index} has {', '.join(profile)}, and the graph takes {', '.join(graph)}")
        for name, shapes in profile.items():
            for shape in shapes:
                fits = len(shape) == len(graph[name]) and all(
                    fixed in (-1, side) for fixed, side in zip(graph[name], shape, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"profile {index} has {name} {list(shape)}, and the graph takes {list(graph[name])}"
                    )


def _inspect(engine: Any, folder: Path, listener: Listener, profiles: int) -> list[int]:
    """Save what the engine says of its layers, and give each profile's memory, where the engine can be opened here."""
    told = listener.activation_bytes[-profiles:]
    ahead_of_time = polygraphy_config.USE_TENSORRT_RTX
    if ahead_of_time and not _GPU_DEVICE.exists():
        return told
    opened = trt.Runtime(listener).deserialize_cuda_engine(engine)
    if opened is None:
        if ahead_of_time:  # for another card than this machine's
            return told
        raise ValueError("the engine that was built cannot be opened")
    text = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    (folder / "inspector.json").write_text(text, encoding="utf-8")
    return [opened.get_device_memory_size_for_profile_v2(index) for index in range(profiles)]


def _peak_bytes() -> int:
    """The most memory that this process held. Its own, which getrusage's is not: that begins with the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
