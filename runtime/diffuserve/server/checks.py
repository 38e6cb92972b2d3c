"""Checks before the start: ports, deployment, model repository. Each failure is one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import NamedTuple

from diffuserve.manifest import Deployment
from diffuserve.residency import first_residents
from diffuserve.server.errors import ServerSetupError
from diffuserve.server.options import GPU_CONFIG, PUBLIC_MODEL, ServerOptions
from diffuserve.sharing import models_of
from diffuserve.spec import device_kind

__all__ = [
    "Ports",
    "address_of",
    "check_model_repository",
    "claim_ports",
    "component_models",
    "config_name",
    "models_at_start",
]


class Ports(NamedTuple):
    """The three ports of a server, none of them 0."""

    http: int
    grpc: int
    metrics: int


def address_of(host: str) -> str:
    """The IPv4 address of a host name, which is what Triton's HTTP endpoint binds to."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ServerSetupError(
            f"host {host!r} is no IPv4 address or name of this machine ({error}): give --host 127.0.0.1 or 0.0.0.0"
        ) from error


def claim_ports(address: str, options: ServerOptions) -> Ports:
    """Check that the wanted ports are free, and pick free ones for those that are 0."""
    wanted = Ports(options.http_port, options.grpc_port, options.metrics_port)
    fixed = [port for port in wanted if port]
    if len(set(fixed)) < len(fixed):
        raise ServerSetupError(
            f"the HTTP, gRPC and metrics ports must differ, and are {wanted.http}, {wanted.grpc} and {wanted.metrics}: "
            "change HTTP_PORT, GRPC_PORT or METRICS_PORT"
        )
    claimed = {}
    with contextlib.ExitStack() as stack:
        for name, port in sorted(wanted._asdict().items(), key=lambda item: item[1] == 0):
            claimed[name] = _bind(stack, address, port, name)
    return Ports(**claimed)


def _bind(stack: contextlib.ExitStack, address: str, port: int, name: str) -> int:
    listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    # A port whose last connections linger after a restart counts as free; one that somebody listens on does not.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    remedy = f"choose another with {name.upper()}_PORT=... (make) or --{name}-port"
    try:
        listener.bind((address, port))
        listener.listen()
    except OverflowError as error:
        raise ServerSetupError(f"{name} port {port} is not between 0 and 65535: {remedy}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServerSetupError(f"{name} port {port} on {address} is taken: free it, or {remedy}") from error
        if error.errno == errno.EACCES:
            raise ServerSetupError(f"{name} port {port} is not allowed to this user: {remedy}") from error
        raise ServerSetupError(
            f"{name} port {port} cannot be bound on {address} ({error.strerror}): give an address of this machine "
            "with --host"
        ) from error
    number: int = listener.getsockname()[1]
    return number


def component_models(deployment: Path) -> tuple[str, ...]:
    """The Triton models of a deployment, in the order of their names."""
    remedy = f"make one with `make export CHECKPOINT=... OUT={deployment}`"
    if not deployment.is_dir():
        raise ServerSetupError(f"there is no deployment at {deployment}: {remedy}")
    if not (deployment / "deployment.json").is_file():
        raise ServerSetupError(f"{deployment} holds no deployment.json: {remedy}")
    names = tuple(sorted(path.parent.name for path in (deployment / "models").glob("*/config.pbtxt")))
    if not names:
        raise ServerSetupError(f"{deployment / 'models'} holds no models (folders with a config.pbtxt): {remedy}")
    if PUBLIC_MODEL in names:
        raise ServerSetupError(
            f"{deployment / 'models' / PUBLIC_MODEL} has the public model's name: export it under another NAME"
        )
    return names


def models_at_start(options: ServerOptions, components: tuple[str, ...]) -> tuple[str, ...]:
    """Of the deployment's models, those that a server begins with: all that manifests name, or what its budget allows.

    Raises ServerSetupError where the sharing options do not fit the deployment.
    """
    sharing = options.sharing
    try:
        models = models_of(Deployment.load(options.deployment))
    except (OSError, ValueError):  # the public model reads it all, and says what is wrong with it
        return components
    for name in (*sharing.weights, *sharing.pinned):
        if name not in models:
            raise ServerSetupError(
                f"{name!r} has a weight or is pinned, and is not deployed; there is {', '.join(models)}"
            )
    budget = sharing.limits.budget
    if budget is None:
        return tuple(name for name in components if any(name in of_one for of_one in models.values()))
    pinned = {model: size for name in sharing.pinned for model, size in models[name].items()}
    if sum(pinned.values()) > budget:
        raise ServerSetupError(
            f"the pinned checkpoints need {sum(pinned.values()) / 1e9:.2f} GB, and the memory budget is "
            f"{budget / 1e9:.2f} GB: raise it with --memory-budget, or pin less"
        )
    first = {model for name in first_residents(models, sharing.pinned, budget) for model in models[name]}
    return tuple(name for name in components if name in first)


def config_name(deployment: Path) -> str:
    """The configuration that models are loaded with: the one for a GPU, or none of its own on a CPU."""
    try:
        opened = Deployment.load(deployment)
        kind = device_kind(opened.manifest(name).target for name in opened.checkpoints)
    except (OSError, ValueError):  # the public model reads it all, and says what is wrong with it
        return ""
    return "" if kind == "cpu" else GPU_CONFIG


def check_model_repository(repository: Path, components: tuple[str, ...]) -> None:
    """The repository must hold the public model, and no model of the deployment a second time."""
    if not (repository / PUBLIC_MODEL / "config.pbtxt").is_file():
        raise ServerSetupError(
            f"{repository} holds no {PUBLIC_MODEL}/config.pbtxt: run from the project's folder, "
            "or name the project's model_repository with --model-repository"
        )
    for name in components:
        if (repository / name).exists():
            raise ServerSetupError(
                f"model {name!r} is in the deployment and in {repository}, and Triton would serve neither: remove one"
            )
