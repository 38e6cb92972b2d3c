"""What a channel and its calls carry besides requests: TLS, and credentials in headers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from diffuserve.errors import InvalidArgumentError

__all__ = ["Security", "Tls", "trace_headers"]

_LOOPBACK: Final = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]|unix:.*)(:\d+)?\Z")
_HEADER_NAME: Final = re.compile(r"(?!grpc-)(?!.*-bin\Z)[0-9a-z_.-]+\Z")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS to the server. `ca`: a PEM file of the authorities to trust, else those that come with gRPC
    (the environment's GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names a file of others).

    `cert` and `key`: PEM files of the client's own certificate and its key, where the server asks for one (mTLS).
    `server_name`: the name that the server's certificate has, where that is not the address's.

    Raises InvalidArgumentError.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgumentError("a client's certificate needs its key, and the key it; give both", input="tls")


@dataclass(frozen=True, slots=True)
class Security:
    """A client's TLS, bearer token and headers, checked.

    Raises InvalidArgumentError.
    """

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        given: Sequence[tuple[str, object]] = self.metadata  # a caller without a type checker brings numbers
        for name, value in given:
            if not _HEADER_NAME.match(name) or not isinstance(value, str) or not _HEADER_VALUE.match(value):
                raise InvalidArgumentError(
                    f"the header {name[:64]!r} cannot be sent: its name must be of letters, digits, - _ and ., not "
                    "gRPC's own (grpc-, -bin), and its value a text of printable ASCII",
                    input="headers",
                )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of every call."""
        given = tuple((name.lower(), value) for name, value in self.headers.items())
        return given if self.token is None else (*given, ("authorization", f"Bearer {self.token}"))

    def check(self, url: str) -> None:
        """Refuse to send a token where everyone on the way can read it. Raises InvalidArgumentError."""
        carries = any(name == "authorization" for name, _ in self.metadata)
        if carries and self.tls is None and not _LOOPBACK.match(url):
            raise InvalidArgumentError(
                f"a token would go to {url} in clear text; give tls, or reach the server over loopback", input="token"
            )

    def credentials(self) -> Any:
        """gRPC's channel credentials, or None for clear text. Raises InvalidArgumentError for files that cannot be."""
        if self.tls is None:
            return None
        import grpc

        return grpc.ssl_channel_credentials(_read(self.tls.ca), _read(self.tls.key), _read(self.tls.cert))

    def channel_options(self, url: str) -> tuple[tuple[str, Any], ...]:
        name = self.tls.server_name if self.tls is not None else None
        named = () if name is None else (("grpc.ssl_target_name_override", name),)
        # A proxy's loopback is another one, and would see the token.
        return (*named, ("grpc.enable_http_proxy", 0)) if _LOOPBACK.match(url) else named


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}; give a PEM file", input="tls") from error
    if b"-----BEGIN " not in data:
        raise InvalidArgumentError(f"{path} holds no PEM; give a certificate or a key in PEM", input="tls")
    return data


def trace_headers() -> Sequence[tuple[str, str]]:
    """The caller's OpenTelemetry context as W3C headers; none where nothing of this process uses OpenTelemetry."""
    if "opentelemetry.context" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((name.lower(), value) for name, value in carrier.items())  # gRPC refuses others
