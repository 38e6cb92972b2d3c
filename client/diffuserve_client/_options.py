"""Options that commands share: a dataclass of options, and one parameter of a command for all of them.

@with_options
def ask(prompt: Annotated[str, typer.Argument()], connection: ConnectionOptions) -> None:
    with errors_as_exit_codes(), open_client(connection) as client:
        ...
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from diffuserve.errors import InvalidArgumentError
from diffuserve_client._client import DEFAULT_URL, Client
from diffuserve_client._config import read_config
from diffuserve_client._exits import tell_of_retries
from diffuserve_client._retry import Retry
from diffuserve_client._security import Tls
from diffuserve_client._timeout import Timeout

__all__ = ["AsJson", "ConnectionOptions", "connection_arguments", "open_client", "with_options"]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer should see it: a parameter of a dataclass's type is an option for each of its fields."""
    given_parameters = inspect.signature(command, eval_str=True).parameters
    groups = {
        name: one.annotation
        for name, one in given_parameters.items()
        if isinstance(one.annotation, type) and is_dataclass(one.annotation)
    }
    parameters = []
    for name, parameter in given_parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def expanded(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{one.name: given.pop(one.name) for one in fields(kind)})
        command(**given)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks for
    expanded.__annotations__ = {one.name: one.annotation for one in parameters}
    return expanded


def _parameters(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)

    def default(one: Field[Any]) -> Any:
        return inspect.Parameter.empty if one.default is MISSING else one.default

    return [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default(one), annotation=hints[one.name])
        for one in fields(kind)
    ]


def _option(variable: str, text: str, **more: Any) -> Any:
    return typer.Option(envvar=f"DIFFUSERVE_{variable}", help=text, rich_help_panel="Connection", **more)


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """Which servers, and on what terms. None: what the configuration file says, else the client's default.

    Typer reads the environment where an option is not given.
    """

    url: Annotated[
        list[str] | None,
        _option(
            "URL",
            "host:port of a server's gRPC port; several times, or with commas, for several servers.",
            show_default=DEFAULT_URL,
        ),
    ] = None
    timeout: Annotated[float | None, _option("TIMEOUT", "Seconds that a request may take in all.")] = None
    stall: Annotated[
        float | None,
        _option("STALL", "Seconds of silence after which a server counts as dead; more on a slow line."),
    ] = None
    retries: Annotated[
        int | None,
        _option("RETRIES", "How often a request is tried again where a server is lost or shuts down; 0 is off."),
    ] = None
    token: Annotated[
        str | None,
        _option(
            "TOKEN",
            "A bearer token. On a command line, others on this machine can see it: rather use the environment or the "
            "configuration file.",
        ),
    ] = field(default=None, repr=False)
    tls: Annotated[
        bool | None,
        _option("TLS", "Speak TLS and trust gRPC's authorities. The other --tls options ask for TLS too."),
    ] = None
    tls_ca: Annotated[str | None, _option("TLS_CA", "The authorities to trust instead, in PEM.", metavar="FILE")] = None
    tls_cert: Annotated[
        str | None, _option("TLS_CERT", "The client's certificate in PEM, where the server wants one.", metavar="FILE")
    ] = None
    tls_key: Annotated[str | None, _option("TLS_KEY", "That certificate's key, in PEM.", metavar="FILE")] = None
    tls_server_name: Annotated[
        str | None,
        _option("TLS_SERVER_NAME", "The name in the server's certificate, where that is not the address's."),
    ] = None


def connection_arguments(options: ConnectionOptions, *, timeout: float | None = None) -> dict[str, Any]:
    """What a Client or an AsyncClient is made with. `timeout` is for where nothing else says one.

    Raises InvalidArgumentError for a configuration file, times, retries or TLS that cannot be meant.
    """
    config = read_config()

    def known(name: str) -> Any:
        said = getattr(options, name)
        return config.get(name) if said is None else said

    total, retries = known("timeout"), known("retries")
    seconds = {"total": timeout if total is None else total, "stall": known("stall")}
    return {
        "url": [part.strip() for one in known("url") or (DEFAULT_URL,) for part in one.split(",")],
        "timeout": Timeout(**{name: one for name, one in seconds.items() if one is not None}),
        "retry": None if retries is None else Retry(retries=retries),
        "tls": _tls(options, config),
        "token": known("token"),
    }


def _tls(options: ConnectionOptions, config: Mapping[str, Any]) -> Tls | None:
    """No TLS where it is refused, or neither it nor any of its details is asked for.

    Options go before the file here too: a `tls = false` in it does not send in clear text what one of them protects.
    Raises InvalidArgumentError where the options contradict each other.
    """
    details = {name: getattr(options, f"tls_{name}") for name in ("ca", "cert", "key", "server_name")}
    given = [f"--tls-{name.replace('_', '-')}" for name, value in details.items() if value]
    if given and options.tls is False:
        raise InvalidArgumentError(
            f"--no-tls and {given[0]} contradict each other, as do their environment variables; leave one out",
            input="tls",
        )
    asked = True if given else config.get("tls") if options.tls is None else options.tls
    known = {name: value or config.get(f"tls_{name}") for name, value in details.items()}
    return Tls(**known) if asked or (asked is None and any(known.values())) else None


def open_client(options: ConnectionOptions, *, timeout: float | None = None) -> Client:
    """The client that the options, the environment and the configuration file ask for, in this order.

    `timeout`: the seconds for a request where none of them says. Raises InvalidArgumentError.
    """
    # gRPC's core writes lines of its own to stderr, where an error should be one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    arguments = connection_arguments(options, timeout=timeout)
    tell_of_retries()
    with _interrupts_held_back():
        return Client(**arguments)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait: in the middle of importing numpy or gRPC it would come out as their ImportError."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
