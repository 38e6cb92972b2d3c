"""`diffuserve models`: the checkpoints of a server, and which of them are in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import typer

from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options

__all__ = ["models"]

_TIMEOUT_S: Final = 10.0


@with_options
def models(connection: ConnectionOptions, as_json: AsJson = False) -> None:
    """List a server's checkpoints: in memory or not, bytes, last use, weight, loads."""
    with errors_as_exit_codes(), open_client(connection, timeout=_TIMEOUT_S) as client:
        status = client.status()
    if as_json:
        typer.echo(json.dumps(status, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(status))
    budget = status["memory_budget"]
    limit = f" of {budget / 1e9:.2f} GB" if budget else ", with no limit"
    console.print(f"{status['resident_bytes'] / 1e9:.2f} GB are in memory{limit}", highlight=False)
    for name, one in status["checkpoints"].items():
        if one.get("error"):
            console.print(f"{name}: {one['error']}", markup=False, highlight=False, soft_wrap=True)


def _table(status: Mapping[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("checkpoint", "state")
    for title in ("GB", "last use", "weight", "requests", "waiting", "loads", "last load"):
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
