"""Keeps a server serving: what `make serve` and the container start.

It starts Triton, asks the public model every second how it is, and starts Triton again when it died, when its model
does not answer any more (Triton itself goes on saying that it is ready), or when the denoising loop stands still. When
it is told to stop, requests under way get a grace time, and what is left of them ends with snapshots.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from diffuserve.server.errors import ServerStartError
from diffuserve.server.options import ServerOptions
from diffuserve.server.process import TritonServer

__all__ = ["Patience", "Supervisor"]

_DRAINED_EXIT_SECONDS: Final = 3.0  # nothing is left to lose then, and a dead stub can hold Triton up


@dataclass(frozen=True)
class Patience:
    """Seconds. A server gets up to `restarts` new starts in `restarts_within`; after that it is not worth another.

    probe_every     between two questions how the server is
    unresponsive    without a good answer, after the first: its model's process is dead or hangs
    stalled         in which the denoising loop made no call, with something to do: longer than any engine call takes
    grace           for requests under way when the server is told to stop
    """

    probe_every: float = 1.0
    unresponsive: float = 6.0
    stalled: float = 120.0
    grace: float = 20.0
    restarts: int = 5
    restarts_within: float = 600.0


class Supervisor:
    """One server after another, with the same options and ports. `say` is told what happens.

    `stop` and `kill` may be called from a signal handler's interruption of `run`.
    """

    def __init__(self, options: ServerOptions, patience: Patience, say: Callable[[str], None]) -> None:
        self.server = TritonServer(options)
        self._patience, self._say = patience, say
        self._started: collections.deque[float] = collections.deque()

    def start(self, announce: Callable[[TritonServer], None]) -> None:
        """Start the first server. Raises ServerSetupError or ServerStartError."""
        self.server.start()
        self._say(f"starting Triton with {len(self.server.launch.models)} models; its log is {self.server.log_file}")
        self.server.wait_ready()
        announce(self.server)

    def run(self) -> None:
        """Watch, and start again what ends. Raises ServerStartError when that does not help."""
        while True:
            reason = self._watch()
            self.server.kill()
            self.server.stop()
            self._note_restart(reason)
            self._say(f"{reason}; starting it again")
            ports = self.server.launch.ports
            self.server = TritonServer(
                replace(self.server.options, http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics)
            )
            self.server.start()
            self.server.wait_ready()
            self._say("serving again")

    def stop(self) -> None:
        """Let requests under way end, or be handed over, and end the server."""
        if self.server.is_ready:
            self._say(f"stopping; requests under way have {self._patience.grace:g} s")
            self.server.drain(self._patience.grace)
            self.server.stop(_DRAINED_EXIT_SECONDS)
        else:
            self._say("stopping")
            self.server.stop()

    def kill(self) -> None:
        """End the server at once."""
        self.server.kill()

    def _watch(self) -> str:
        """Return when the server must be started again, with the reason."""
        good = None
        while self.server.wait(self._patience.probe_every) is None:
            status = self.server.status()
            now = time.monotonic()
            if status is not None:
                good = now
                if (stalled := float(status["stalled_s"])) > self._patience.stalled:
                    return f"the denoising loop has stood still for {stalled:.0f} s"
            elif good is not None and now - good > self._patience.unresponsive:
                return f"the public model has not answered for {now - good:.0f} s"
        return f"the server died ({self.server.exit_reason()})"

    def _note_restart(self, reason: str) -> None:
        now = time.monotonic()
        while self._started and now - self._started[0] > self._patience.restarts_within:
            self._started.popleft()
        if len(self._started) == self._patience.restarts:
            raise ServerStartError(
                f"{reason}, after {len(self._started)} new starts in {self._patience.restarts_within:g} s; the log, "
                f"{self.server.log_file}, ends:\n{self.server.log_tail()}"
            )
        self._started.append(now)
