"""`python -m diffuserve.server`: serve a deployment in the foreground until Ctrl-C, SIGTERM or SIGHUP.

Exit codes: 0 after a clean stop, 1 if the server did not start or died again and again, 2 if a check failed before
the start.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final

from diffuserve.server.errors import ServerSetupError, ServerStartError
from diffuserve.server.options import PUBLIC_MODEL, ServerOptions
from diffuserve.server.process import TritonServer
from diffuserve.server.snapshot_key import with_snapshot_key
from diffuserve.server.supervisor import Patience, Supervisor
from diffuserve.sharing import SharingOptions, weight_from

_TOGETHER_SECONDS: Final = 0.5
#: From, and to: an hour of grace is what a drain takes, and the others are bounds of what makes sense.
_LIMITS: Final = {
    "grace": (0, 3600),
    "stall_timeout": (1, 86400),
    "start_timeout": (1, 86400),
    "exit_timeout": (0, 3600),
    "lora_budget_mb": (1, 1 << 20),
    "memory_budget": (0, 1e6),
}
_EXAMPLE: Final = """{"prompt": "a red circle", "image_encoding": "base64"}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop, and return the exit code."""
    try:
        options, patience = settings_from(arguments)
        supervisor = Supervisor(with_snapshot_key(options), patience, _say)
    except ServerSetupError as error:
        return _fail(str(error), code=2)
    with _Signals(supervisor.kill) as signals:
        try:
            supervisor.start(lambda server: _say(_announcement(server)))
            supervisor.run()
        except KeyboardInterrupt:
            supervisor.stop()
        except ServerSetupError as error:
            return _fail(str(error), code=2)
        except ServerStartError as error:
            return _fail(str(error))
        finally:
            signals.stopping = True
            supervisor.server.stop()
    return 0


class _Signals:
    """The signals that end a server: the first interrupts what the main thread waits for, later ones end it at once.

    SIGHUP comes when a terminal is closed, and is left alone where `nohup` said so. Who signals a process group signals
    make, which passes SIGTERM on: two that come together are one.
    """

    def __init__(self, kill: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.stopping = False
        self._kill, self._clock, self._first = kill, clock, -math.inf

    def __enter__(self) -> _Signals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self) for number in numbers}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping, self._first = True, self._clock()
            raise KeyboardInterrupt
        if self._clock() - self._first > _TOGETHER_SECONDS:
            self._kill()


def _announcement(server: TritonServer) -> str:
    unserved = "".join(f"warning: {name} cannot be served: {why}\n" for name, why in server.unserved.items())
    return (
        f"{unserved}serving {server.options.deployment}: "
        f"gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}\n"
        f"try: curl -s {server.http_url}/v2/models/{PUBLIC_MODEL}/generate -d '{_EXAMPLE}'"
    )


def _say(text: str) -> None:
    # A closed terminal must not keep requests from being handed over.
    with contextlib.suppress(OSError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _fail(text: str, code: int = 1) -> int:
    sys.stderr.write(f"error: {text}\n")
    return code


def settings_from(arguments: Sequence[str] | None = None) -> tuple[ServerOptions, Patience]:
    """What a command line asks for. Raises ServerSetupError where that is out of range."""
    parsed = _parser().parse_args(arguments)
    for name, (least, most) in _LIMITS.items():
        value = getattr(parsed, name)
        if value is not None and not least <= value <= most:  # written so that a NaN fails
            raise ServerSetupError(
                f"--{name.replace('_', '-')} is {value:.12g}, and must be from {least:.12g} to {most:.12g}"
            )
    options = ServerOptions(
        deployment=parsed.deployment,
        embeddings=parsed.embeddings,
        loras=parsed.loras,
        lora_budget_mb=parsed.lora_budget_mb,
        model_repository=parsed.model_repository,
        host=parsed.host,
        http_port=parsed.http_port,
        grpc_port=parsed.grpc_port,
        metrics_port=parsed.metrics_port,
        cache=parsed.cache,
        log_file=parsed.log_file,
        echo="everything" if parsed.verbose else "warnings",
        start_timeout=parsed.start_timeout,
        exit_timeout=parsed.exit_timeout,
        sharing=_sharing(parsed),
        triton_arguments=tuple(parsed.triton_argument),
    )
    return options, Patience(grace=parsed.grace, stalled=parsed.stall_timeout)


def _sharing(parsed: argparse.Namespace) -> SharingOptions:
    """What the command line says, and what it leaves out as the environment says. Raises ServerSetupError."""
    try:
        told = SharingOptions.from_environment(os.environ)
        limits = {
            "budget": None if parsed.memory_budget is None else round(parsed.memory_budget * 1e9),
            "idle": None if parsed.idle_release is None else parsed.idle_release * 60,
            "stay": parsed.least_stay,
            "loads": parsed.loads_per_minute,
        }
        given = {name: value for name, value in limits.items() if value is not None}
        weights = {**told.weights, **dict(map(weight_from, parsed.weight))}
        return SharingOptions(replace(told.limits, **given), weights, tuple(parsed.pin) or told.pinned)
    except ValueError as error:
        raise ServerSetupError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffuserve.server",
        description="Serve a deployment with Triton, in the foreground, until Ctrl-C or SIGTERM.",
        epilog="The tritonserver is the one that TRITONSERVER names, else an installed one, "
        "else one that is fetched into the cache.",
    )
    add = parser.add_argument
    add("--deployment", type=Path, required=True, help="the folder that `make export` wrote")
    add("--embeddings", type=Path, help="the folder of textual inversions (default: embeddings in the deployment)")
    add("--loras", type=Path, help="the folder of LoRAs (default: loras in the deployment)")
    add("--lora-budget-mb", type=int, help="MiB of LoRA files to hold in memory (default: 1024)")
    add("--model-repository", type=Path, help="the public model's folder (default: model_repository)")
    add("--host", default="127.0.0.1", help="the address to bind; 0.0.0.0 is every one (default: %(default)s)")
    add("--http-port", type=int, default=8000, help="0 picks a free one, as for the others (default: %(default)s)")
    add("--grpc-port", type=int, default=8001, help="(default: %(default)s)")
    add("--metrics-port", type=int, default=8002, help="(default: %(default)s)")
    add("--cache", type=Path, help="where Triton is unpacked (default: $DIFFUSERVE_CACHE, else build/cache)")
    add("--log-file", type=Path, help="Triton's log (default: logs/triton-<http port>.log in the cache)")
    add("--verbose", action="store_true", help="all of Triton's log on standard error, not only warnings and errors")
    add("--start-timeout", type=float, default=600.0, help="seconds to load every model (default: %(default)g)")
    add("--exit-timeout", type=int, default=10, help="seconds for requests in flight at the end (default: %(default)s)")
    add(
        "--grace",
        type=float,
        default=20.0,
        help="seconds for requests under way at the end; what is left of them "
        "then is handed over as snapshots (default: %(default)g)",
    )
    add(
        "--stall-timeout",
        type=float,
        default=120.0,
        help="seconds without an engine call, with something to do, after "
        "which Triton is started again (default: %(default)g)",
    )
    add(
        "--memory-budget",
        type=float,
        metavar="GB",
        help="what the components of all checkpoints may take; those used longest ago leave (default: no limit)",
    )
    add(
        "--idle-release",
        type=float,
        metavar="MINUTES",
        help="without a request after which a checkpoint leaves the memory; 0 is never (default: 15)",
    )
    add("--least-stay", type=float, metavar="SECONDS", help="before a checkpoint makes room for others (default: 10)")
    add("--loads-per-minute", type=int, help="the most loads of checkpoints in any minute (default: 12)")
    add("--weight", action="append", default=[], metavar="NAME=W", help="a checkpoint's share of the time (default: 1)")
    add("--pin", action="append", default=[], metavar="NAME", help="a checkpoint that never leaves; may be repeated")
    add("--triton-argument", action="append", default=[], help="passed to tritonserver as it is; may be repeated")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(main())
