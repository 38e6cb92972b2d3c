"""One tritonserver process, from its start to the last of its children and shared memory."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from diffuserve.manifest import Deployment
from diffuserve.server.errors import ServerSetupError, ServerStartError
from diffuserve.server.launch import Launch, prepare
from diffuserve.server.options import PUBLIC_MODEL, ServerOptions
from diffuserve.server.probe import Probe
from diffuserve.server.processes import ModelProcess, members
from diffuserve.sharing import models_of

__all__ = ["TritonServer"]

_POLL_SECONDS = 0.1
_REAP_POLL_SECONDS = 0.01
_KILL_AFTER = 5.0
_AFTER_GRACE = 3.5  # for the step under way, pictures that are being encoded, and the answer
_TAIL_LINES = 20
_SHARED_MEMORY = Path("/dev/shm")
_WARNING_OR_ERROR = re.compile(r"[WE]\d{4} ")
_TABLE = re.compile(r"[|+]|I\d{4} .*\] $")
_PR_SET_PDEATHSIG = 1


class TritonServer:
    """A server and its children; they end with `stop`, with the `with` block, or with this process.

    with TritonServer(ServerOptions(deployment, http_port=0, grpc_port=0, metrics_port=0)) as server:
        server.wait_ready()
        client = Client(server.grpc_url)
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._launch: Launch | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._spawned = threading.Event()
        self._exited = threading.Event()
        self._group: int | None = None
        self._ready = False
        self._public: ModelProcess | None = None
        #: Checkpoints that could not be loaded at the start, with the reasons; the others are served.
        self.unserved: Mapping[str, str] = {}
        self._tail: collections.deque[str] = collections.deque(maxlen=400)

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Where it serves.

    @property
    def launch(self) -> Launch:
        """The checked start: command, ports, models."""
        if self._launch is None:
            raise RuntimeError("the server was not started: call start() first")
        return self._launch

    @property
    def grpc_url(self) -> str:
        """`host:port`, as gRPC clients take it."""
        return f"{self.launch.reachable}:{self.launch.ports.grpc}"

    @property
    def http_url(self) -> str:
        """The base of the HTTP endpoint."""
        return f"http://{self.launch.reachable}:{self.launch.ports.http}"

    @property
    def metrics_url(self) -> str:
        """The Prometheus endpoint."""
        return f"http://{self.launch.reachable}:{self.launch.ports.metrics}/metrics"

    @property
    def log_file(self) -> Path:
        """The server's own log."""
        return self.launch.log_file

    @property
    def pid(self) -> int | None:
        """The process id of tritonserver while it runs."""
        return self._group

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs, negative for a signal."""
        return self._process.returncode if self._process and self._exited.is_set() else None

    # Its life.

    def start(self) -> None:
        """Check, fetch what is missing, and start the process; `wait_ready` says when it serves."""
        if self._launch is not None:
            raise RuntimeError("the server was started before: make another TritonServer")
        self._launch = prepare(self.options)
        # The kernel ends a child when the *thread* that forked it ends, so a thread of its own starts the server.
        self._thread = threading.Thread(target=self._run, args=(self._opened_log(),), name="tritonserver", daemon=True)
        try:
            self._thread.start()
            self._spawned.wait()
        except BaseException:  # Ctrl-C
            self.stop()
            raise
        if self._failure is not None:
            raise ServerStartError(f"{self._launch.arguments[0]} cannot be run: {self._failure}") from self._failure

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return when every model is loaded; raise as soon as one failed or the process died."""
        limit = self.options.start_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        probe = Probe(self.http_url)
        while not self._exited.wait(_POLL_SECONDS):
            if self._is_ready(probe):
                if (group := self._group) is not None:
                    self._public = ModelProcess(group, PUBLIC_MODEL)
                    self._public.is_gone()  # which it looks for now
                self._ready = True
                return
            if time.monotonic() > deadline:
                raise ServerStartError(self._with_log(f"the server is not ready after {limit:g} s"))
        raise ServerStartError(self._with_log(f"the server died before it was ready ({self.exit_reason()})"))

    @property
    def is_ready(self) -> bool:
        """Whether it was ready, and runs."""
        return self._ready and not self._exited.is_set()

    def lost_public_model(self) -> bool:
        """Whether the public model's process was there and is gone, which Triton itself does not tell."""
        return self._public is not None and self._public.is_gone()

    def status(self, timeout: float = 3.0) -> dict[str, Any] | None:
        """What the public model says of itself (`operation=status`); None where it does not answer."""
        return Probe(self.http_url, timeout).operate("status")

    def drain(self, grace: float) -> dict[str, Any] | None:
        """Have requests under way end within `grace` seconds, or be handed over; None where nobody answers in time.

        New ones are refused from now on.
        """
        probe = Probe(self.http_url, grace + _AFTER_GRACE)
        return probe.operate("drain", token=self.launch.token, grace_ms=round(1000 * grace))

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the process to end, and return its exit code; None if it still runs after the timeout."""
        self._exited.wait(timeout)
        return self.returncode

    def stop(self, patience: float | None = None) -> None:
        """End the server and all its children; harmless when it has ended.

        `patience` is for how many seconds it may take; by default as long as Triton waits for requests in flight.
        """
        if self._thread is None or self._thread.ident is None:
            return
        self._spawned.wait()
        if (leader := self._group) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGTERM)
        if not self._exited.wait(self.options.exit_timeout + _KILL_AFTER if patience is None else patience):
            self.kill()
            self._exited.wait()

    def kill(self) -> None:
        """End the server and all its children at once, without waiting."""
        if (group := self._group) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def exit_reason(self) -> str:
        """Why the process ended, in words."""
        code = self.returncode
        if code is None:
            return "it still runs"
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of the log, without Triton's tables."""
        kept = [line for line in tuple(self._tail) if line.strip() and not _TABLE.match(line)]
        return "\n".join(kept[-lines:])

    # Inside.

    def _is_ready(self, probe: Probe) -> bool:
        # Triton opens its ports after it has tried every model, so the states are final by then.
        if probe.server_id() != self.launch.server_id:
            return False
        states = probe.model_states()
        if states is None:
            return False
        failed = {
            name: reason or self._logged_reason(name)
            for name in self.launch.models
            for state, reason in [states.get(name, ("", ""))]
            if state not in ("READY", "LOADING")
        }
        if failed and not self._serves_without(failed):
            reasons = "\n".join(f"{name}: {reason.strip()}" for name, reason in failed.items())
            summary = f"{len(failed)} of {len(self.launch.models)} models failed to load"
            raise ServerStartError(self._with_log(f"{summary}\n{reasons}"))
        if any(states.get(name, ("", ""))[0] == "LOADING" for name in self.launch.models):
            return False  # which readiness, as this server is started, does not tell
        return probe.is_ready()

    def _serves_without(self, failed: Mapping[str, str]) -> bool:
        """Whether a checkpoint is whole though these models failed; `unserved` has the others, with the reasons."""
        if PUBLIC_MODEL in failed:
            return False
        try:
            checkpoints = models_of(Deployment.load(self.options.deployment))
        except (OSError, ValueError):
            return False
        self.unserved = {
            name: failed[lost[0]].strip()
            for name, models in checkpoints.items()
            if (lost := [model for model in models if model in failed])
        }
        return any(
            name not in self.unserved and all(model in self.launch.models for model in models)
            for name, models in checkpoints.items()
        )

    def _logged_reason(self, name: str) -> str:
        lines = [line for line in tuple(self._tail) if line.startswith("E") and f"'{name}'" in line]
        return lines[-1] if lines else "Triton gave no reason"

    def _with_log(self, message: str) -> str:
        return f"{message}\nThe log, {self.log_file}, ends:\n{self.log_tail()}"

    def _opened_log(self) -> BinaryIO:
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            if self.log_file.is_file() and self.log_file.stat().st_size:  # it may say why the last server died
                self.log_file.replace(self.log_file.with_name(f"{self.log_file.name}.1"))
            return self.log_file.open("wb")
        except OSError as error:
            raise ServerSetupError(
                f"the log {self.log_file} cannot be written ({error.strerror}): name another with --log-file"
            ) from error

    def _run(self, log: BinaryIO) -> None:
        launch = self.launch
        try:
            with log:
                self._process = process = subprocess.Popen(
                    launch.arguments,
                    env=dict(launch.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    restore_signals=False,  # SIGPIPE stays ignored, so that it stops cleanly if this process is killed
                    preexec_fn=_end_with_parent(os.getpid()),
                )
                self._group = process.pid
                self._spawned.set()
                reader = threading.Thread(target=self._copy_log, args=(process, log), daemon=True)
                reader.start()
                self._reap(process)
                reader.join(_KILL_AFTER)
        except (OSError, subprocess.SubprocessError) as error:
            self._failure = error
        finally:
            self._exited.set()
            self._spawned.set()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # Not reaped yet, the leader keeps its process group's number from being given to anybody else.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        # A stub that was started late has inherited the ports: who starts the next server needs them.
        deadline = time.monotonic() + _KILL_AFTER
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(_REAP_POLL_SECONDS)
        self._group = None
        process.wait()
        # Its children become those of process 1, which is this one in a container.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-process.pid, os.WNOHANG)[0]:
                pass
        for region in _SHARED_MEMORY.glob(f"{self.launch.shm_prefix}*"):
            region.unlink(missing_ok=True)

    def _copy_log(self, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                self._tail.append(line)
                # A full disk or a closed terminal must not stop the server, which waits for its lines to be read.
                with contextlib.suppress(OSError, ValueError):
                    log.write(raw)
                    log.flush()
                if self._echoes(line):
                    with contextlib.suppress(OSError, ValueError):
                        sys.stderr.write(line + "\n")

    def _echoes(self, line: str) -> bool:
        if self.options.echo == "warnings":
            return self._ready and _WARNING_OR_ERROR.match(line) is not None
        return self.options.echo == "everything"


def _end_with_parent(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec: ask the kernel for SIGTERM when its parent is gone."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before the request
            os._exit(1)

    return in_child
