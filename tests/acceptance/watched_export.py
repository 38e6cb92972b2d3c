"""One `make export`, watched from outside: the seconds and the memory of each of its stages."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from conftest import ROOT

__all__ = ["Run", "Stage", "watched_export"]

_STAGE: Final = re.compile(r" *\d+ s  (\w+) (\w+)")
_VERIFIED: Final = re.compile(r"│ (\w+) +│ (\w+) +│ ([\dx ]+?) +│ ([\d.e+-]+) +│")
_PERIOD: Final = 0.2


@dataclass
class Stage:
    """One stage of one component: its seconds, and the most memory that all processes held together meanwhile."""

    component: str
    name: str
    seconds: float = 0.0
    peak: int = 0


@dataclass
class Run:
    """What was seen of an export, and its exit code."""

    stages: list[Stage] = field(default_factory=lambda: [Stage("", "starting")])
    lines: list[str] = field(default_factory=list)
    code: int = -1

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.stages)

    @property
    def peak(self) -> int:
        return max(one.peak for one in self.stages)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def of(self, component: str) -> dict[str, Stage]:
        """A component's stages by name."""
        return {one.name: one for one in self.stages if one.component == component}

    def errors(self) -> dict[tuple[str, str, str], float]:
        """Relative errors against torch, by component, output and shape, as the export's table has them."""
        return {(found[1], found[2], found[3]): float(found[4]) for found in _VERIFIED.finditer(self.output)}


def watched_export(options: Sequence[str]) -> Run:
    """`make export` with `options`, like "FAMILY=sdxl", ended if whoever waits for it is.

    Its lines tell when a stage begins; they are shown as they come. Another thread looks at its memory.
    """
    run, started = Run(), time.monotonic()
    command = ["make", "--no-print-directory", "--silent", "export", *options]
    with _started(command) as process, _sampled(run, process.pid):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            run.lines.append(line)
            if match := _STAGE.match(line):
                now = time.monotonic()
                run.stages[-1].seconds, started = now - started, now
                run.stages.append(Stage(match[2], match[1]))
        run.code = process.wait()
        run.stages[-1].seconds = time.monotonic() - started
    return run


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        except BaseException:
            process.terminate()  # make hands it on, and the export ends its own processes
            raise


@contextlib.contextmanager
def _sampled(run: Run, pid: int) -> Iterator[None]:
    """Keep the peak of the run's newest stage, by looking five times a second."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_PERIOD):
            stage = run.stages[-1]
            stage.peak = max(stage.peak, _held(pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _held(pid: int) -> int:
    """Bytes of memory that a process and all that it started hold, and nobody can take from them.

    Pages of mapped files are not among them: weights that are read from a file of 5 GB are the system's cache, which it
    drops where memory is wanted. Shared memory counts for each that holds it.
    """
    try:
        process = psutil.Process(pid)
        family = (process, *process.children(recursive=True))
    except psutil.NoSuchProcess:
        return 0
    return sum(_held_alone(one.pid) for one in family)


def _held_alone(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return 0
    lines = (line.split() for line in status.splitlines())
    return sum(1024 * int(line[1]) for line in lines if line and line[0] in ("RssAnon:", "RssShmem:"))
