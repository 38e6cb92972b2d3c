"""What a server has and how it is, read from its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffuserve.errors import DiffuserveError, InternalError

__all__ = ["Checkpoint", "Health", "checkpoints_of", "health_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A deployed checkpoint.

    `state` is absent, loading, resident, leaving or unloading, and `bytes` what it takes in memory. `limits` is what it
    takes (sizes in pixels, and whether pictures and LoRAs may be given), `defaults` what it uses where a request says
    nothing, `samplers` the names of samplers, `loras` those of the LoRAs in the server's folder that fit it; `error`
    why it could not be loaded. docs/operations.md lists the keys; `told` is all that the server says.
    """

    name: str
    state: str
    resident: bool
    bytes: int
    limits: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    samplers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    error: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a server is. `state` is serving, draining or unreachable, and then `error` says why.

    `waiting` and `active` count its requests; `latency_s` is how long the answer took.
    """

    url: str
    state: str
    waiting: int = 0
    active: int = 0
    version: str | None = None
    latency_s: float = 0.0
    error: DiffuserveError | None = None

    @property
    def is_serving(self) -> bool:
        return self.state == "serving"


def checkpoints_of(status: Mapping[str, Any]) -> tuple[Checkpoint, ...]:
    """Raises InternalError for a status that no server of this release tells."""
    try:
        return _checkpoints(status)
    except (KeyError, TypeError, AttributeError) as error:
        raise _strange(error) from error


def _checkpoints(status: Mapping[str, Any]) -> tuple[Checkpoint, ...]:
    return tuple(
        Checkpoint(
            name=name,
            state=one["state"],
            resident=one["resident"],
            bytes=one["bytes"],
            limits=one.get("limits", {}),
            defaults=one.get("defaults", {}),
            samplers=tuple(one.get("samplers", ())),
            loras=tuple(one.get("loras", ())),
            error=one.get("error"),
            told=one,
        )
        for name, one in status["checkpoints"].items()
    )


def health_of(url: str, answer: Mapping[str, Any] | DiffuserveError, seconds: float) -> Health:
    if isinstance(answer, DiffuserveError):
        return Health(url=url, state="unreachable", latency_s=seconds, error=answer)
    try:
        return Health(
            url=url,
            state=answer["state"],
            waiting=answer["waiting"],
            active=answer["active"],
            version=answer.get("version"),
            latency_s=seconds,
        )
    except KeyError as error:
        return Health(url=url, state="unreachable", latency_s=seconds, error=_strange(error))


def _strange(error: Exception) -> InternalError:
    return InternalError(f"the server's status cannot be read ({error!r}); use a server and a client of one release")
