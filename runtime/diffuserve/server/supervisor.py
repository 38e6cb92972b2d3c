"""Keeps a server serving: what `make serve` and the container start.

It starts Triton, looks every second whether the public model's process is there, asks it how it is, and starts Triton
again when one of them died, when there is no answer for long (Triton itself goes on saying that it is ready), or when
the engines stand still. When it is told to stop, requests under way get a grace time, and what is left of them ends
with snapshots.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from diffuserve.server.errors import ServerSetupError, ServerStartError
from diffuserve.server.options import ServerOptions
from diffuserve.server.process import TritonServer

__all__ = ["Patience", "Supervisor"]

_NOTHING_TO_LOSE_SECONDS: Final = 3.0  # for Triton's own end once nothing runs: a dead stub can hold it up
_END_SECONDS: Final = 4.5  # for all that comes after the grace time: a second more than a drain may take


@dataclass(frozen=True)
class Patience:
    """Seconds. A server gets up to `restarts` new starts in `restarts_within`; after that it is not worth another.

    probe_every     between two questions how the server is
    unresponsive    without a good answer: the model hangs. A process that is gone is seen at once, so this may be long:
                    on a machine that has too much to do an answer can take many seconds
    stalled         in which an engine call or the denoising loop did not come to an end: longer than any engine takes
    grace           for requests under way when the server is told to stop
    """

    probe_every: float = 1.0
    unresponsive: float = 30.0
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
            reason: str | None = self._watch()
            while reason is not None:
                self.server.kill()
                self.server.stop()
                self._note_restart(reason)
                self._say(f"{reason}; starting it again")
                reason = self._start_again()
            self._say("serving again")

    def _start_again(self) -> str | None:
        """Start the next server on the same ports. Why it did not start, or None. Raises ServerSetupError."""
        ports = self.server.launch.ports
        self.server = TritonServer(
            replace(self.server.options, http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics)
        )
        try:
            self.server.start()
            self.server.wait_ready()
        except ServerSetupError:
            raise
        except ServerStartError as error:
            return str(error).partition("\n")[0]
        return None

    def stop(self) -> None:
        """Let requests under way end, or be handed over, and end the server."""
        if self.server.is_ready:
            grace = self._patience.grace
            self._say(f"stopping; requests under way have {grace:g} s")
            end = time.monotonic() + grace + _END_SECONDS
            if self.server.drain(grace) is None:
                self._say("the server does not answer: what was under way is lost, and must be sent again")
            self.server.stop(min(max(end - time.monotonic(), 1.0), _NOTHING_TO_LOSE_SECONDS))
        else:
            self._say("stopping")
            self.server.stop(_NOTHING_TO_LOSE_SECONDS)

    def kill(self) -> None:
        """End the server at once."""
        self.server.kill()

    def _watch(self) -> str:
        """Return when the server must be started again, with the reason."""
        good = time.monotonic()  # it became ready a moment ago
        while self.server.wait(self._patience.probe_every) is None:
            if self.server.lost_public_model():
                return "the public model's process is gone"
            status = self.server.status()
            now = time.monotonic()
            if status is not None:
                good = now
                if (stalled := float(status["stalled_s"])) > self._patience.stalled:
                    return f"the engines have stood still for {stalled:.0f} s"
            elif now - good > self._patience.unresponsive:
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
