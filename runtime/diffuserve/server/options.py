"""What to serve, and where: the options of one server process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffuserve.sharing import SharingOptions

__all__ = ["GPU_CONFIG", "PUBLIC_MODEL", "Echo", "ServerOptions"]

PUBLIC_MODEL = "diffusion"
GPU_CONFIG = "gpu"
"""The name of the public model's configuration on a GPU: configs/gpu.pbtxt beside its config.pbtxt."""

Echo = Literal["nothing", "warnings", "everything"]


@dataclass(frozen=True)
class ServerOptions:
    """The options of one server; a port of 0 means any free one."""

    deployment: Path
    """The folder that `make export` wrote: `deployment.json` and `models/`."""
    embeddings: Path | None = None
    """The folder of textual inversions; by default `embeddings` in the deployment. It need not exist."""
    loras: Path | None = None
    """The folder of LoRAs; by default `loras` in the deployment. It need not exist."""
    lora_budget_mb: int | None = None
    """MiB of LoRA files that are held in memory; by default 1024."""
    model_repository: Path | None = None
    """The folder that holds the public model; by default `model_repository` here or beside the package."""
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    cache: Path | None = None
    """Where the embedded server is unpacked; by default $DIFFUSERVE_CACHE, else `build/cache`."""
    log_file: Path | None = None
    """Where the server's own log goes; by default `logs/triton-<http port>.log` in the cache."""
    echo: Echo = "nothing"
    """Which log lines are also written to standard error: warnings and errors once the server is ready, or all."""
    start_timeout: float = 600.0
    """Seconds until every model must be loaded."""
    exit_timeout: int = 10
    """Seconds that Triton waits for requests in flight and for models to unload when it stops."""
    shm_bytes: int = 8 * 2**20
    """Shared memory that each Python-backend model begins with; it grows where a request needs more."""
    sharing: SharingOptions = field(default_factory=lambda: SharingOptions.from_environment(os.environ))
    """How checkpoints share memory and time; by default as the environment says."""
    triton_arguments: tuple[str, ...] = ()
    """Passed to tritonserver as they are, after all others."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the server's environment."""

    def cache_folder(self) -> Path:
        """The cache as an absolute path."""
        return (self.cache or Path(os.environ.get("DIFFUSERVE_CACHE") or "build/cache")).absolute()

    def repository_folder(self) -> Path:
        """The public model's repository as an absolute path, whether it exists or not."""
        if self.model_repository is not None:
            return self.model_repository.absolute()
        here = Path("model_repository").absolute()
        beside_sources = Path(__file__).resolve().parents[3] / "model_repository"
        return beside_sources if beside_sources.is_dir() and not here.is_dir() else here
