"""Clients and servers that are killed, shut down, or reached over TLS. `make accept-client`."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trustme

from blocking import Blocking
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.server.snapshot_key import with_snapshot_key
from diffuserve_client import Client, Event, GenerateRequest, GenerateResult, Retry, Timeout, Tls

COUNT = 500
SAMPLERS = ("euler", "ddim", "dpmpp_2m", "euler_ancestral")
PROMPTS = ("a large red circle on a blue background", "a small green ring", "a yellow diamond on a black background")

both = pytest.mark.parametrize("client_class", [Client, Blocking], ids=["Client", "AsyncClient"])


def requests(count: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt=PROMPTS[seed % 3], steps=4 + seed % 5, sampler=SAMPLERS[seed % 4], seed=seed, num_images=1 + seed % 2
        )
        for seed in range(count)
    ]


def pictures(result: GenerateResult) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(one.image).astype(int) for one in result.images]


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> list[list[np.ndarray[Any, Any]]]:
    """Every request's pictures, from a server that nobody disturbs."""
    return [pictures(result) for result in client.generate_many(requests(COUNT))]


class Mortal:
    """A supervised server at ports of its own, which can be killed with all its processes, and started again."""

    def __init__(self, deployment: Path, folder: Path) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            ports = [str(one.getsockname()[1]) for one in sockets]
        self.url = f"127.0.0.1:{ports[1]}"
        self._command = [sys.executable, "-m", "diffuserve.server", "--deployment", str(deployment)]
        self._command += ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]
        self._command += ["--log-file", str(folder / "log")]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def wait_serving(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if re.match("serving ", line):
                return
        raise AssertionError("it never served")

    def kill(self) -> None:
        """SIGKILL to the supervisor, Triton and the models' processes at once."""
        assert self._process is not None
        victims = [psutil.Process(self._process.pid)]
        victims += victims[0].children(recursive=True)
        for one in victims:
            one.send_signal(signal.SIGKILL)
        psutil.wait_procs(victims, timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(30)


@contextmanager
def mortal(deployment: Path, folder: Path) -> Iterator[Mortal]:
    server = Mortal(deployment, folder)
    server.start()
    try:
        server.wait_serving()
        yield server
    finally:
        server.kill()


@both
def test_500_requests_outlive_a_server_that_is_killed_twice(
    client_class: Any, deployment: Path, undisturbed: list[list[np.ndarray[Any, Any]]], tmp_path: Path
) -> None:
    asked = requests(COUNT)
    images: Counter[tuple[int, int]] = Counter()
    lock = threading.Lock()

    def hear(index: int, event: Event) -> None:
        if event.kind == "image":
            with lock:
                images[index, event.index] += 1

    results: dict[int, GenerateResult] = {}
    retry = Retry(retries=100, first=0.25, most=2)
    with (
        mortal(deployment, tmp_path) as server,
        client_class(server.url, timeout=Timeout(total=600), retry=retry) as client,
    ):
        for result in client.generate_many(asked, in_order=False, on_event=hear):
            assert result.index not in results
            results[result.index] = result
            if len(results) in (COUNT // 4, COUNT // 2):
                server.kill()
                server.start()
    assert sorted(results) == list(range(COUNT))
    assert len({result.request_id for result in results.values()}) == COUNT
    assert images == {(index, image): 1 for index in range(COUNT) for image in range(asked[index].num_images)}
    worst = 0
    for index, expected in enumerate(undisturbed):
        for picture, other in zip(pictures(results[index]), expected, strict=True):
            worst = max(worst, int(np.abs(picture - other).max()))
    print(f"{COUNT} requests, two kills: pictures at most {worst}/255 from an undisturbed run's")
    assert worst <= 1


@both
def test_what_a_draining_server_has_goes_on_at_the_other(client_class: Any, deployment: Path, tmp_path: Path) -> None:
    asked = [GenerateRequest(prompt="a ring", steps=100, sampler="dpmpp_2m_sde", seed=seed) for seed in range(12)]
    options = [
        with_snapshot_key(
            ServerOptions(deployment=deployment, http_port=0, grpc_port=0, metrics_port=0, log_file=tmp_path / name)
        )
        for name in "ab"
    ]
    snapshots = threading.Semaphore(0)

    def hear(_: int, event: Event) -> None:
        if event.kind == "snapshot":
            snapshots.release()

    with ExitStack() as stack:
        first, second = (stack.enter_context(TritonServer(one)) for one in options)
        first.wait_ready()
        second.wait_ready()
        with client_class(second.grpc_url, timeout=Timeout(total=120)) as alone:
            whole = [pictures(result)[0] for result in alone.generate_many(asked)]
        with client_class([first.grpc_url, second.grpc_url], timeout=Timeout(total=120)) as client:
            many = client.generate_many(asked, concurrency=12)
            drain = threading.Timer(1.0, first.drain, (0.0,))
            drain.start()
            results = list(many)
            drain.join()
    resumed = [result.images[0].info.get("resumed_at_step", 0) for result in results]
    print(f"went on elsewhere at steps {[step for step in resumed if step]}")
    assert any(resumed), "the drain came too late to be seen"
    for result, expected in zip(results, whole, strict=True):
        assert np.abs(pictures(result)[0] - expected).max() <= 1


@both
def test_tls_with_a_real_triton(client_class: Any, deployment: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    theirs, ours = authority.issue_cert("localhost"), authority.issue_cert("client.test")
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "server", "server_key", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    theirs.cert_chain_pems[0].write_to_path(paths["server"])
    theirs.private_key_pem.write_to_path(paths["server_key"])
    ours.cert_chain_pems[0].write_to_path(paths["cert"])
    ours.private_key_pem.write_to_path(paths["key"])
    options = ServerOptions(
        deployment=deployment,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=tmp_path / "log",
        triton_arguments=(
            "--grpc-use-ssl=1",
            "--grpc-use-ssl-mutual=1",
            f"--grpc-server-cert={paths['server']}",
            f"--grpc-server-key={paths['server_key']}",
            f"--grpc-root-cert={paths['ca']}",
        ),
    )
    with TritonServer(options) as server:
        server.wait_ready()
        url = server.grpc_url.replace("127.0.0.1", "localhost")
        tls = Tls(ca=paths["ca"], cert=paths["cert"], key=paths["key"])
        with client_class(url, tls=tls, token="secret", timeout=60) as client:
            assert client.generate("a ring", steps=2, seed=1).image.size == (64, 64)
            assert client.health()[0].is_serving
