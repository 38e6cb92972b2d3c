"""This service as the benches run it: a real Triton on loopback, its client, and the log of its engine calls."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, GeneratedImage, GenerateRequest, Timeout

__all__ = ["OurServer", "our_server"]

_PATIENCE = Timeout(total=3600, stall=3600)


@dataclass(frozen=True)
class OurServer:
    """A running server. Calling it serves a request."""

    client: Client
    call_log: Path

    def __call__(self, request: GenerateRequest) -> GeneratedImage:
        return self.client.generate(request).images[0]

    def calls(self, after: int = 0) -> list[dict[str, Any]]:
        """Each component call so far but the first `after`: model, shapes, start (monotonic clock) and seconds."""
        return [json.loads(line) for line in self.call_log.read_text().splitlines()[after:]]


@contextmanager
def our_server(deployment: Path, environment: Mapping[str, str] | None = None) -> Iterator[OurServer]:
    """A server that is warm."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls.jsonl"
        options = ServerOptions(
            deployment=deployment,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log_file=Path(folder) / "triton.log",
            environment={"DIFFUSERVE_CALL_LOG": str(log), **(environment or {})},
        )
        with TritonServer(options) as server, Client(server.grpc_url, timeout=_PATIENCE) as client:
            server.wait_ready()
            ours = OurServer(client, log)
            client.generate("warm up", steps=2)
            _settle(ours)
            yield ours


def _settle(server: OurServer) -> None:
    """Wait until a new server has made the calls by which it learns what its engines cost."""
    before = -1
    while before != (now := len(server.calls())):
        before = now
        time.sleep(1.0)
