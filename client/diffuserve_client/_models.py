"""`diffuserve models`: the checkpoints of a server, what may be asked of each, and which are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import typer

from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options

if TYPE_CHECKING:
    from diffuserve_client._deployed import Checkpoint

__all__ = ["models"]

_TIMEOUT_S: Final = 10.0


@with_options
def models(*, connection: ConnectionOptions, as_json: AsJson = False) -> None:
    """List a server's checkpoints: what may be asked of each, and whether it is in memory.

    Of several servers, the first that answers.
    """
    from diffuserve_client._deployed import checkpoints_of

    with errors_as_exit_codes():
        with open_client(connection, timeout=_TIMEOUT_S) as client:
            status = client.status()
        if as_json:
            typer.echo(json.dumps(status, ensure_ascii=False))
            return
        from rich.console import Console

        console = Console(markup=False, highlight=False, soft_wrap=True)
        console.print(_table(status))
        budget = status["memory_budget"]
        limit = f" of {budget / 1e9:.2f} GB" if budget else ", with no limit"
        console.print(f"{status['resident_bytes'] / 1e9:.2f} GB are in memory{limit}")
        for checkpoint in checkpoints_of(status):
            for line in _lines(checkpoint):
                console.print(line)


def _table(status: Mapping[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    # Columns are close together, so that what is usual fits into 80 characters.
    table = Table("checkpoint", "state", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("GB", "last use", "weight", "active", "waiting", "loads", "load"):
        table.add_column(title, justify="right")
    for name, one in status["checkpoints"].items():
        numbers = (one["weight"], one["requests"], one["waiting"], one["loads"])
        table.add_row(
            escape(name),
            f"{one['state']}, pinned" if one["pinned"] else one["state"],
            f"{one['bytes'] / 1e9:.2f}",
            "never" if one["last_use_s"] is None else f"{one['last_use_s']:.0f} s ago",
            *(f"{number:g}" for number in numbers),
            f"{one['load_s']:.1f} s" if one["loads"] else "-",
        )
    return table


def _lines(checkpoint: Checkpoint) -> Iterator[str]:
    """What may be asked of it, as far as the server tells."""
    name = checkpoint.name
    if checkpoint.error:
        yield f"{name}: {checkpoint.error}"
    if checkpoint.limits:
        yield f"{name}: takes {', '.join(_limits(checkpoint.limits))}"
    if checkpoint.defaults:
        defaults = (f"{one.replace('_', ' ')} {value}" for one, value in checkpoint.defaults.items() if value)
        yield f"{name}: by default {', '.join(defaults)}"
    if checkpoint.samplers:
        yield f"{name}: samplers {', '.join(checkpoint.samplers)}"
    if checkpoint.loras:
        yield f"{name}: LoRAs {', '.join(checkpoint.loras)}"


def _limits(limits: Mapping[str, Any]) -> Iterator[str]:
    for name, limit in limits.items():
        spoken = name.replace("_", " ")
        if isinstance(limit, Mapping):
            yield f"{spoken} {limit['minimum']} to {limit['maximum']} by {limit['step']}"
        elif name.startswith("needs_"):
            yield from [spoken] if limit else []
        elif isinstance(limit, bool) or not limit:
            yield spoken if limit else f"no {spoken}"
        else:
            yield f"{spoken} up to {limit}"
