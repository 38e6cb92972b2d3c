"""A component's graph, made in a process of its own.

torch's exporter and ONNX Runtime keep memory that the engine's builder needs next, and a process gives all of it back.
One that runs out of memory ends alone. A second process imports torch once, and forks for each graph:

    export --(plan, component, path)--> server --fork--> graph_from_component --(what it reports, its graph)--> export
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from diffuserve_export.errors import ExportError
from diffuserve_export.processes import end_with_parent, thrifty_environment
from diffuserve_export.report import Report

if TYPE_CHECKING:
    from diffuserve_export.export import Plan
    from diffuserve_export.graphs import Graph
    from diffuserve_export.verify import Verified

__all__ = ["Server", "graph_from_component", "serve"]

_MAIN: Final = "from diffuserve_export import graph_process; graph_process.main()"


def graph_from_component(plan: Plan, component: str, path: Path, report: Report) -> Graph:
    """`graphs.graph_from_component` in another process, with what it reports and raises.

    Raises ExportError as well where that process was killed.
    """
    kind, content = _server.answer((plan, component, path), report)
    if kind == "graph":
        graph: Graph = content
        return graph
    if kind == "ended":
        raise ExportError(f"{component}: the process that made its graph {_how_it_ended(content)}")
    error, elsewhere = content
    raise error from (None if isinstance(error, ExportError) else _ElsewhereError(elsewhere))


def _how_it_ended(code: int) -> str:
    return f"was ended by signal {-code}; it may have run out of memory" if code < 0 else f"ended with {code}"


class Server:
    """The process that forks: started when it is first needed, and ended with whatever it does when nobody waits."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def answer(self, job: object, report: Report) -> tuple[str, Any]:
        """Hand on what is reported until there is an end: "graph", "error" or "ended", and what belongs to it."""
        with self._one_at_a_time:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(pickle.dumps(job))
                process.stdin.flush()
                while True:
                    kind, content = pickle.load(process.stdout)
                    if kind in ("graph", "error", "ended"):
                        return kind, content
                    getattr(report, kind)(*content)
            except (EOFError, BrokenPipeError):
                self.stop()
                return "ended", process.returncode
            except BaseException:  # Ctrl-C, or a report that fails
                self.stop()
                raise

    def _start(self) -> subprocess.Popen[bytes]:
        """In a session of its own, where Ctrl-C does not reach it."""
        command = [*self.command, str(os.getpid())]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=thrifty_environment(),
            start_new_session=True,
        )

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


_server = Server(sys.executable, "-c", _MAIN)
atexit.register(lambda: _server.stop())


class _ElsewhereError(Exception):
    """The other process's traceback, shown above this one's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _SentReport(Report):
    """Everything that is reported becomes a message: a method's name and its arguments."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        self.send = send

    def stage(self, component: str, stage: str) -> None:
        self.send("stage", (component, stage))

    def verified(self, results: list[Verified]) -> None:
        self.send("verified", (results,))

    def note(self, text: str) -> None:
        self.send("note", (text,))


def main() -> None:
    """The server. Its argument is the process that it serves."""
    end_with_parent(int(sys.argv[1]))
    from diffuserve_export import graphs

    serve(graphs.graph_from_component)


def serve(work: Callable[[Plan, str, Path, Report], Graph]) -> None:
    """Do `work` in a fork for each job that comes in, until no more can come."""
    jobs, messages = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the messages

    def send(kind: str, content: Any) -> None:
        messages.write(pickle.dumps((kind, content)))
        messages.flush()

    while jobs.peek(1):
        job = pickle.load(jobs)
        worker = os.fork()
        if not worker:
            _work(work, job, send)
        _, status = os.waitpid(worker, 0)
        if code := os.waitstatus_to_exitcode(status):
            send("ended", code)


def _work(work: Callable[..., Graph], job: tuple[Any, ...], send: Callable[[str, Any], None]) -> NoReturn:
    """The fork: it never returns to the loop that it was forked from."""
    try:
        end_with_parent(os.getppid())
        try:
            message: tuple[str, Any] = ("graph", work(*job, _SentReport(send)))
        except Exception as error:  # all of them are raised again in the process that asked
            message = ("error", (error, traceback.format_exc()))
        send(*message)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
