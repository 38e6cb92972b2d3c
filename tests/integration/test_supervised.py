"""The supervised server: nothing is lost when processes die, or when it is told to end under load."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from diffuserve.request import Event
from diffuserve_client import (
    Client,
    ConnectionFailedError,
    DrainingError,
    GenerateRequest,
    Retry,
    Timeout,
    UnavailableError,
)

GRACE = 3
LOAD = 16
SEEN_BY_CLIENTS = r"nothing came from .* for 2 s|connection to .* was lost|process of model 'diffusion' .* died"


@dataclass(frozen=True)
class Supervised:
    process: subprocess.Popen[str]
    grpc_url: str

    def read_until(self, beginning: str) -> str:
        """The first line that begins like this, a regular expression."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if re.match(beginning, line):
                return line
        raise AssertionError(f"it never said {beginning!r}")

    def kill_stub(self, model: str) -> None:
        """End the Python backend's process of a model as the kernel would, out of memory."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.status() == psutil.STATUS_ZOMBIE:  # one of those killed before
                continue
            command = " ".join(child.cmdline())
            if "python_backend_stub" in command and f" {model}_0_0 " in command:
                child.send_signal(signal.SIGKILL)
                return
        raise AssertionError(f"{model} has no process")


@contextmanager
def supervised(deployment: Path, folder: Path) -> Iterator[Supervised]:
    command = [sys.executable, "-m", "diffuserve.server", "--deployment", str(deployment), "--grace", str(GRACE)]
    command += [*("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--log-file", str(folder / "log"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = Supervised(process, "")
            said = server.read_until("serving ")
            address = re.search(r"gRPC (\S+),", said)
            assert address, said
            yield Supervised(process, address[1])
        finally:
            if process.poll() is None:
                process.terminate()
                process.send_signal(signal.SIGCONT)


@contextmanager
def running(client: Client, **parameters: Any) -> Iterator[list[Future[Any]]]:
    """Some requests of which one at least is being stepped."""
    stepped = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        asked = {"steps": 60, "sampler": "euler_ancestral", **parameters}
        yield [
            pool.submit(client.generate, "a ring", on_progress=lambda _: stepped.set(), seed=seed, **asked)
            for seed in range(4)
            if seed == 0 or stepped.wait(60)
        ]


def test_processes_that_die_are_replaced_and_no_request_is_lost(
    deployment: Path, client: Client, tmp_path: Path
) -> None:
    expected = [client.generate("a ring", steps=60, sampler="euler_ancestral", seed=seed).image for seed in range(4)]
    with (
        supervised(deployment, tmp_path) as server,
        Client(server.grpc_url, timeout=Timeout(total=60), retry=Retry(retries=0)) as theirs,
    ):
        for model in ("shapes_unet", "shapes_vae_decoder", "shapes_text_encoder"):
            with running(theirs) as requests:
                server.kill_stub(model)
            for request, picture in zip(requests, expected, strict=True):
                difference = np.asarray(request.result().image).astype(int) - np.asarray(picture)
                assert np.abs(difference).max() <= 1, model
        # A prompt that no encoder has seen lately.
        assert theirs.generate("a large green square on a red background", steps=2).images

        with (
            Client(server.grpc_url, timeout=Timeout(total=60, stall=2), retry=Retry(retries=0)) as hasty,
            running(hasty) as requests,
        ):
            # With the supervisor held back, nobody ends the connections of the dead process's clients.
            server.process.send_signal(signal.SIGSTOP)
            server.kill_stub("diffusion")
            for request in requests:
                with pytest.raises((ConnectionFailedError, UnavailableError), match=SEEN_BY_CLIENTS):
                    request.result(20)
            server.process.send_signal(signal.SIGCONT)
            noticed = time.monotonic()
            # Triton may follow: it aborts at times when a process of its own is gone.
            server.read_until(r"(the public model's process is gone|the server died).*; starting it again")
            server.read_until("serving again")
            assert time.monotonic() - noticed < 12
        assert theirs.generate("a ring", steps=2).images


def _keep_asking(client: Client) -> None:
    while True:
        client.generate("a late comer", steps=1)


def test_told_to_end_under_load_every_request_ends_in_a_picture_or_a_snapshot(
    deployment: Path, client: Client, tmp_path: Path
) -> None:
    asked = [
        GenerateRequest(
            prompt="a ring",
            steps=150 if i else 100,
            seed=i,
            sampler="dpmpp_2m_sde",
            progress_every=1,
            heartbeat_ms=1000,
        )
        for i in range(LOAD)
    ]
    begun = threading.Event()
    with (
        supervised(deployment, tmp_path) as server,
        Client(server.grpc_url, timeout=Timeout(total=60), retry=Retry(retries=0)) as theirs,
        ThreadPoolExecutor(LOAD) as pool,
    ):

        def last(request: GenerateRequest) -> Event:
            with suppress(DrainingError):  # what a snapshot is followed by where nothing is tried again
                for event in theirs.stream(request):
                    if event.kind == "progress" and event.step >= 3:
                        begun.set()
            return event

        ends = [pool.submit(last, request) for request in asked]
        assert begun.wait(60)
        told = time.monotonic()
        server.process.terminate()
        with pytest.raises(DrainingError, match="takes no new requests"):
            _keep_asking(theirs)
        assert server.process.wait(GRACE + 5) == 0
        assert time.monotonic() - told < GRACE + 5
    kinds = [end.result().kind for end in ends]
    assert set(kinds) <= {"image", "snapshot"}
    assert "snapshot" in kinds
    moved = max((i for i, kind in enumerate(kinds) if kind == "snapshot"), key=lambda i: ends[i].result().step)
    snapshot = ends[moved].result()
    assert 0 < snapshot.step < snapshot.steps
    again = client.resume(snapshot.data)
    whole = client.generate("a ring", steps=snapshot.steps, seed=moved, sampler="dpmpp_2m_sde")
    assert again.images[0].info["resumed_at_step"] == snapshot.step
    difference = np.asarray(again.image).astype(int) - np.asarray(whole.image)
    assert np.abs(difference).max() <= 1
