"""`diffuserve health`: whether the servers answer, and how busy they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import typer

from diffuserve_client._exits import errors_as_exit_codes, exit_code
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options

if TYPE_CHECKING:
    from diffuserve_client._deployed import Health

__all__ = ["HEALTH_EXIT_CODES_HELP", "health"]

HEALTH_EXIT_CODES_HELP: Final = (
    "Exit codes: 0 every server serves; 2 a bad value or usage; 3 a server cannot be reached; 4 a server is shutting "
    "down, or its model is not ready; 130 Ctrl-C."
)
_TIMEOUT_S: Final = 10.0
_SHUTTING_DOWN: Final = 4


@with_options
def health(*, connection: ConnectionOptions, as_json: AsJson = False) -> None:
    """Ask each server how it is: its state, its requests, and how long the answer took."""
    with errors_as_exit_codes():
        with open_client(connection, timeout=_TIMEOUT_S) as client:
            found = client.health()
        typer.echo(_as_json(found) if as_json else _as_text(found))
        if codes := [_code(one) for one in found if not one.is_serving]:
            raise typer.Exit(min(codes))


def _code(one: Health) -> int:
    return _SHUTTING_DOWN if one.error is None else exit_code(one.error)


def _as_text(found: Sequence[Health]) -> str:
    return "\n".join(
        f"{one.url}  {one.state}  {one.active} active, {one.waiting} waiting  {1000 * one.latency_s:.0f} ms"
        if one.error is None
        else f"{one.url}  {one.state}  {' '.join(one.error.message.split())}"
        for one in found
    )


def _as_json(found: Sequence[Health]) -> str:
    servers: list[dict[str, Any]] = [
        {
            "url": one.url,
            "state": one.state,
            "waiting": one.waiting,
            "active": one.active,
            "version": one.version,
            "latency_s": round(one.latency_s, 4),
            "error": None if one.error is None else {"code": one.error.code, "message": one.error.message},
        }
        for one in found
    ]
    return json.dumps({"servers": servers}, ensure_ascii=False)
