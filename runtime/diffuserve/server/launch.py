"""From options to the one command that is run: pure but for the checks that it calls."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffuserve.server.checks import (
    Ports,
    address_of,
    check_model_repository,
    claim_ports,
    component_models,
    config_name,
    models_at_start,
)
from diffuserve.server.embedded import Triton, find_triton
from diffuserve.server.options import PUBLIC_MODEL, ServerOptions

__all__ = ["Launch", "command_line", "prepare", "server_environment"]


#: glibc raises its threshold for memory that goes back to the system with what is freed, up to 32 MiB: pictures that
#: requests came with would then be kept in pieces, and a server's memory grow with every wave of them. It does so too
#: where each thread has an arena of its own, of which only the end is given back.
_ALLOCATOR: Final = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 4 << 20, "MALLOC_TRIM_THRESHOLD_": 1_000_000}


@dataclass(frozen=True)
class Launch:
    """A checked start: what to run, and what to expect of it."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    server_id: str
    """What this very process answers at /v2, so that another server on the port is not taken for it."""
    token: str
    """Who knows it may drain the server."""
    shm_prefix: str
    """The names of its regions in /dev/shm begin with this."""
    models: tuple[str, ...]
    address: str
    ports: Ports
    log_file: Path

    @property
    def reachable(self) -> str:
        """The address at which this machine reaches the server."""
        return _reachable(self.address)


def prepare(options: ServerOptions, environment: Mapping[str, str] | None = None) -> Launch:
    """Run every check, fetch the embedded server where it is needed, and compose the command."""
    inherited = os.environ if environment is None else environment
    deployment = options.deployment.absolute()
    components = component_models(options.deployment)
    check_model_repository(options.repository_folder(), components)
    config = config_name(options.deployment)
    address = address_of(options.host)
    ports = claim_ports(address, options)
    triton = find_triton(options.cache_folder(), inherited)
    token = secrets.token_hex(16)
    server_id = f"diffuserve-{os.getpid()}-{secrets.token_hex(4)}"
    models = (*models_at_start(options, components), PUBLIC_MODEL)
    return Launch(
        arguments=command_line(triton, options, address, ports, models, server_id, config),
        environment={
            **server_environment(triton, options, deployment, inherited),
            "DIFFUSERVE_TOKEN": token,
            "DIFFUSERVE_HTTP_URL": f"http://{_reachable(address)}:{ports.http}",
        },
        server_id=server_id,
        token=token,
        shm_prefix=f"{server_id}-",
        models=models,
        address=address,
        ports=ports,
        log_file=(options.log_file or options.cache_folder() / "logs" / f"triton-{ports.http}.log").absolute(),
    )


def _reachable(address: str) -> str:
    return "127.0.0.1" if address == "0.0.0.0" else address


def command_line(
    triton: Triton,
    options: ServerOptions,
    address: str,
    ports: Ports,
    models: tuple[str, ...],
    server_id: str,
    config: str = "",
) -> tuple[str, ...]:
    """The arguments of tritonserver. `config` is the name of the models' configurations, where they have such."""
    arguments = [
        str(triton.binary),
        f"--id={server_id}",
        f"--model-repository={options.deployment.absolute() / 'models'}",
        f"--model-repository={options.repository_folder()}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        # The exported configurations are complete; without this each Python model is started twice.
        "--disable-auto-complete-config",
        # Components that left the memory come back when they are needed: the server is ready without them.
        "--strict-readiness=false",
        # Stay up when a model fails, so that the repository index can say which and why.
        "--exit-on-error=false",
        f"--exit-timeout-secs={options.exit_timeout}",
        f"--backend-config=python,shm-region-prefix-name={server_id}-",
        f"--backend-config=python,shm-default-byte-size={options.shm_bytes}",
    ]
    for name, port in ports._asdict().items():
        arguments += [f"--{name}-address={address}", f"--{name}-port={port}"]
    if config:
        arguments.append(f"--model-config-name={config}")
    if triton.backends:
        arguments.append(f"--backend-directory={triton.backends}")
    if triton.embedded:  # it has no backend that could use a GPU
        arguments += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    return (*arguments, *options.triton_arguments)


def server_environment(
    triton: Triton, options: ServerOptions, deployment: Path, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The environment of tritonserver, in which its Python stubs find this interpreter's packages."""
    environment = dict(inherited)
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join((scripts, inherited.get("PATH", os.defpath)))
    if triton.library_folder:
        folders = (str(triton.library_folder), inherited.get("LD_LIBRARY_PATH", ""))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    for name, value in _ALLOCATOR.items():
        environment.setdefault(name, str(value))
    environment["DIFFUSERVE_DEPLOYMENT"] = str(deployment)
    if options.embeddings is not None:
        environment["DIFFUSERVE_EMBEDDINGS"] = str(options.embeddings.absolute())
    if options.loras is not None:
        environment["DIFFUSERVE_LORAS"] = str(options.loras.absolute())
    if options.lora_budget_mb is not None:
        environment["DIFFUSERVE_LORA_BUDGET_MB"] = str(options.lora_budget_mb)
    environment.update(options.sharing.environment())
    environment.update(options.environment)
    return environment
