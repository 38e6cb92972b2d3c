"""`diffuserve rollout`: which checkpoint the requests for an alias get. Writes a file that running servers follow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._options import AsJson, with_options

if TYPE_CHECKING:
    from diffuserve.rollout import Alias, RolloutTable
    from diffuserve.server.probe import Probe

__all__ = ["rollout"]

_EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done, and with --server in effect there; 1 the server refuses it, and goes on as before; 2 a bad "
    "value or usage, and nothing has changed; 3 the server cannot be reached; 130 Ctrl-C."
)
_POLL_SECONDS: Final = 0.2

rollout = typer.Typer(
    no_args_is_help=True,
    help="Try a new version of a checkpoint on a share of the requests; promote it, or roll back. Without a restart.",
    epilog=_EXIT_CODES_HELP,
)

DeploymentFolder = Annotated[Path, typer.Argument(help="The folder that is served.")]
AliasName = Annotated[str, typer.Argument(help="The alias.")]
Server = Annotated[
    str | None,
    typer.Option(help="The HTTP address of a server of this folder: wait until it follows. http://localhost:8000"),
]
Patience = Annotated[float, typer.Option(help="Seconds to wait for the server, which may load checkpoints first.")]


@dataclass(frozen=True, kw_only=True)
class Following:
    """Whether to wait for a server, and how to tell of it."""

    server: Server = None
    timeout: Patience = 120.0
    as_json: AsJson = False


@rollout.command("set", epilog=_EXIT_CODES_HELP)
@with_options
def set_weights(
    *,
    deployment: DeploymentFolder,
    alias: Annotated[str, typer.Argument(help="As in shop=shop-v1:90,shop-v2:10; without weights, equal shares.")],
    default: Annotated[bool, typer.Option("--default", help="Requests that name no checkpoint get it too.")] = False,
    following: Following,
) -> None:
    """Give an alias to checkpoints by their weights. The stable one comes first."""
    from diffuserve.rollout import Alias, parse_weights

    with errors_as_exit_codes():
        name, weights = parse_weights(alias)

        def change(table: RolloutTable) -> RolloutTable:
            known = table.aliases.get(name)
            changed = table.with_alias(name, known.changed(weights) if known else Alias.new(weights))
            return changed.with_default(name) if default else changed

        _write(deployment, change, following)


@rollout.command(epilog=_EXIT_CODES_HELP)
@with_options
def promote(
    *,
    deployment: DeploymentFolder,
    alias: AliasName,
    checkpoint: Annotated[str | None, typer.Argument(help="One of its checkpoints; by default the last.")] = None,
    following: Following,
) -> None:
    """Give every request for an alias to one of its checkpoints."""

    def promoted(one: Alias) -> Alias:
        wanted = checkpoint or list(one.weights)[-1]
        if wanted not in one.weights:
            listed = ", ".join(one.weights)
            raise InvalidArgumentError(f"{alias} has {listed} and not {wanted}; give it a share first with set")
        return one.promoted(wanted)

    with errors_as_exit_codes():
        _change_alias(deployment, alias, promoted, following)


@rollout.command(epilog=_EXIT_CODES_HELP)
@with_options
def rollback(*, deployment: DeploymentFolder, alias: AliasName, following: Following) -> None:
    """Give every request for an alias to its stable checkpoint; after a promotion, to the one before."""

    def rolled_back(one: Alias) -> Alias:
        try:
            return one.rolled_back()
        except KeyError as error:
            raise InvalidArgumentError(f"{alias} has had no checkpoint before {one.stable[-1]}; use set") from error

    with errors_as_exit_codes():
        _change_alias(deployment, alias, rolled_back, following)


@rollout.command(epilog=_EXIT_CODES_HELP)
@with_options
def remove(*, deployment: DeploymentFolder, alias: AliasName, following: Following) -> None:
    """Take an alias away: requests that name it are refused. A default is the deployment's own again."""
    with errors_as_exit_codes():
        _change_alias(deployment, alias, lambda _: None, following)


@rollout.command(epilog=_EXIT_CODES_HELP)
def status(
    deployment: DeploymentFolder,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show what is decided; with --server, what that server makes of it."""
    with errors_as_exit_codes():
        _checkpoints(deployment)  # a mistyped folder is no deployment without a rollout
        table, digest = _table(deployment)
        _print(table, digest, None if server is None else _ask(server), as_json)


def _change_alias(
    deployment: Path,
    alias: str,
    change: Callable[[Alias], Alias | None],
    following: Following,
) -> None:
    def changed(table: RolloutTable) -> RolloutTable:
        if alias not in table.aliases:
            listed = ", ".join(table.aliases) or "none"
            raise InvalidArgumentError(f"there is no alias {alias[:80]!r}; there are {listed}")
        return table.with_alias(alias, change(table.aliases[alias]))

    _write(deployment, changed, following)


def _write(
    deployment: Path,
    change: Callable[[RolloutTable], RolloutTable],
    following: Following,
) -> None:
    """Change the table, show it, and wait until the server follows."""
    from diffuserve.rollout import change_table

    change_table(deployment, _checkpoints(deployment), change)
    table, digest = _table(deployment)
    told = None
    if following.server is not None:
        written = (deployment / table.FILE).stat().st_mtime_ns
        told = _followed(following.server, digest, written, time.monotonic() + following.timeout)
    _print(table, digest, told, following.as_json)


def _checkpoints(deployment: Path) -> Sequence[str]:
    """Those that it holds. Raises InvalidArgumentError where it is no deployment."""
    from diffuserve.manifest import Deployment

    try:
        return Deployment.load(deployment).checkpoints
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"{deployment} is no deployment: {error}") from error


def _print(table: RolloutTable, digest: str, server: dict[str, Any] | None, as_json: bool) -> None:
    if not as_json:
        typer.echo(_as_text(table, server, digest))
        return
    told: dict[str, Any] = {
        "table": digest,
        "default": table.default,
        "aliases": {name: {"shares": one.shares(), "stable": list(one.stable)} for name, one in table.aliases.items()},
    }
    if server is not None:
        told["server"] = server
    typer.echo(json.dumps(told, ensure_ascii=False))


def _table(deployment: Path) -> tuple[RolloutTable, str]:
    from diffuserve.rollout import read_table

    try:
        return read_table(deployment)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{deployment}: its table cannot be read: {error}; correct or remove it") from error


def _followed(server: str, digest: str, written: int, until: float) -> dict[str, Any]:
    """What the server says once the table is in effect. Raises DiffuserveError where that does not come about.

    Until the server has looked, it may tell of a table before this one; so a refusal must be of the file that was
    `written` then (mtime in ns).
    """
    reason = "it does not follow this folder"
    has_answered = False
    while True:
        told = _told(server)
        if told is None and not (has_answered or _is_there(server)):
            raise _no_answer(server)
        if told is not None:
            has_answered = True
            if told["table"] == digest:
                return told
            reason = told["problem"] or reason
            if told.get("refused") == written:
                failed = "; ".join(f"{name}: {why}" for name, why in told["failed"].items())
                raise DiffuserveError(f"{server} goes on as before: {reason}{f' ({failed})' if failed else ''}")
        if time.monotonic() > until:
            raise _no_answer(server) if told is None else DiffuserveError(f"{server} goes on as before: {reason}")
        time.sleep(_POLL_SECONDS)


def _ask(server: str) -> dict[str, Any]:
    if (told := _told(server)) is None:
        raise _no_answer(server)
    return told


def _told(server: str) -> dict[str, Any] | None:
    """None where it does not answer, or not in time."""
    told = _probe(server).operate("status")
    return dict(told["rollout"]) if told and "rollout" in told else None


def _is_there(server: str) -> bool:
    """Whether there is a Triton, even if what it serves is too busy to answer, as it may be while it loads."""
    return _probe(server).server_id() is not None


def _probe(server: str) -> Probe:
    from diffuserve.server.probe import Probe

    return Probe(server.rstrip("/"))


def _no_answer(server: str) -> ConnectionFailedError:
    return ConnectionFailedError(
        f"no diffuserve server answers at {server}; give its HTTP address, as in http://localhost:8000", url=server
    )


def _as_text(table: RolloutTable, server: dict[str, Any] | None, digest: str) -> str:
    lines = [f"default: {table.default or 'the first checkpoint'}"]
    for name, alias in table.aliases.items():
        shares = ", ".join(f"{target} {100 * share:.4g} %" for target, share in alias.shares().items())
        lines.append(f"{name}: {shares}; stable {alias.stable[-1]}")
    if server is not None:
        lines.append(f"in effect on the server: {'yes' if server['table'] == digest else 'no'}")
        lines += [f"  {key}: {server[key]}" for key in ("problem", "loading") if server[key]]
        lines += [f"  {name} failed: {reason}" for name, reason in server["failed"].items()]
    return "\n".join(lines)
