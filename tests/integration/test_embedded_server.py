"""The real embedded Triton, with small Python models instead of an export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffuserve.server import ServerOptions, ServerStartError, TritonServer

ANY_PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [{{name: "text" data_type: TYPE_STRING dims: [1]}}]
output [{{name: "text" data_type: TYPE_STRING dims: [1]}}]
instance_group [{{kind: KIND_CPU count: 1}}]
"""

MODEL = """
import json, os, sys
import numpy
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("text", self.answer(request))]) for request in requests]

    def answer(self, request):
        text = pb.get_input_tensor_by_name(request, "text")
        {answer}
"""

UPPER_CASE = "return numpy.array([text.as_numpy()[0].upper()], dtype=object)"
ASK_COMPONENT = """
        child = pb.InferenceRequest(model_name="upper", requested_output_names=["text"], inputs=[text])
        upper = pb.get_output_tensor_by_name(child.exec(), "text").as_numpy()[0].decode()
        facts = {"upper": upper, "prefix": sys.prefix, "python": sys.version}
        facts["deployment"] = os.environ["DIFFUSERVE_DEPLOYMENT"]
        return numpy.array([json.dumps(facts).encode()], dtype=object)
"""


def write_model(repository: Path, name: str, *, initialize: str = "pass", answer: str = UPPER_CASE) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    (repository / name / "1/model.py").write_text(
        textwrap.dedent(MODEL).format(initialize=initialize, answer=answer.strip())
    )


def write_deployment(folder: Path, *, initialize: str = "pass") -> ServerOptions:
    """A component, a public model that calls it, and the options that serve both."""
    write_model(folder / "deployment/models", "upper", initialize=initialize)
    write_model(folder / "public", "diffusion", answer=ASK_COMPONENT)
    (folder / "deployment/deployment.json").write_text("{}")
    return ServerOptions(
        folder / "deployment",
        model_repository=folder / "public",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=folder / "server.log",
    )


def get(url: str, body: Any = None) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, data=None if body is None else json.dumps(body).encode(), timeout=30) as response:
        return response.read().decode()


def commands_naming(folder: Path) -> dict[int, str]:
    """The running servers and stubs whose command line names a folder; their own supervisor is not one of them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program, *arguments = path.read_bytes().decode(errors="replace").split("\0")
            if "triton" in Path(program).name and str(folder) in " ".join(arguments):
                found[int(path.parent.name)] = program
    return found


def wait_for_end(processes: dict[int, str], seconds: float) -> None:
    for pid, program in processes.items():
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            ended, _, _ = select.select([descriptor], [], [], seconds)
            os.close(descriptor)
            assert ended, f"{program} still runs"


def regions_of(processes: dict[int, str]) -> set[Path]:
    """The files in /dev/shm that processes have mapped."""
    regions = set()
    for pid in processes:
        maps = Path(f"/proc/{pid}/maps").read_text()
        regions |= {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if " /dev/shm/diffuserve-" in line}
    return regions


@contextlib.contextmanager
def supervisor(options: ServerOptions, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "diffuserve.server", "--deployment", str(options.deployment)]
    command += ["--model-repository", str(options.model_repository), "--log-file", str(options.log_file)]
    command += [*ANY_PORTS, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"the supervisor never said {beginning!r}: {process.communicate()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(write_deployment(tmp_path_factory.mktemp("serving"))) as started:
        started.wait_ready(120)
        yield started


def test_a_request_reaches_the_public_model_and_its_component(server: TritonServer) -> None:
    answer = json.loads(get(f"{server.http_url}/v2/models/diffusion/generate", {"text": "a circle"}))
    assert json.loads(answer["text"]) == {
        "upper": "A CIRCLE",
        "deployment": str(server.options.deployment),
        "prefix": sys.prefix,
        "python": sys.version,
    }


def test_every_endpoint_listens_on_loopback_only(server: TritonServer) -> None:
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in server.launch.ports:
                listening[int(port, 16)] = address
    assert set(listening) == set(server.launch.ports)
    assert all(address.endswith("0100007F") for address in listening.values()), listening
    assert server.grpc_url == f"127.0.0.1:{server.launch.ports.grpc}"


def test_metrics_and_log_are_where_they_are_said_to_be(server: TritonServer) -> None:
    assert 'nv_inference_count{model="upper"' in get(server.metrics_url)
    assert "successfully loaded 'diffusion'" in server.log_file.read_text()
    assert server.returncode is None


def test_a_model_that_fails_to_load_gives_its_reason(tmp_path: Path) -> None:
    options = write_deployment(tmp_path, initialize="raise RuntimeError('the weights are missing')")
    with TritonServer(options) as failing:
        with pytest.raises(ServerStartError, match="1 of 2 models failed to load") as caught:
            failing.wait_ready(120)
        started = commands_naming(tmp_path)
        assert started
    assert "upper: Internal: RuntimeError: the weights are missing" in str(caught.value)
    assert str(options.log_file) in str(caught.value)
    wait_for_end(started, 10)


def test_a_model_without_a_version_gives_triton_s_words(tmp_path: Path) -> None:
    options = write_deployment(tmp_path)
    (options.deployment / "models/upper/1/model.py").unlink()
    (options.deployment / "models/upper/1").rmdir()
    with (
        TritonServer(options) as failing,
        pytest.raises(ServerStartError, match=r"upper: .*at least one version must be available"),
    ):
        failing.wait_ready(120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals, server: TritonServer) -> None:
    with supervisor(write_deployment(tmp_path)) as process:
        said = read_until(process, "serving ")
        assert f"serving {tmp_path / 'deployment'}: gRPC 127.0.0.1:" in said
        assert server.http_url not in said  # two servers run side by side
        started = commands_naming(tmp_path)
        regions = regions_of(started)
        assert len(started) == 3  # the server and two stubs
        assert len(regions) == 2
        process.send_signal(number)
        output, errors = process.communicate(timeout=15)
    assert process.returncode == 0, errors
    assert "stopping" in output
    wait_for_end(started, 1)
    assert not [region for region in regions if region.exists()]
    assert get(f"{server.http_url}/v2/health/ready") == ""


def test_a_signal_interrupts_the_loading_of_models(tmp_path: Path) -> None:
    pipe = tmp_path / "loading"
    os.mkfifo(pipe)
    options = write_deployment(tmp_path, initialize=f"open({str(pipe)!r}, 'w').close(); __import__('time').sleep(600)")
    with supervisor(options) as process:
        read_until(process, "starting Triton")
        with pipe.open():  # returns when the model loads
            started = commands_naming(tmp_path)
        process.terminate()
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 0, errors
    wait_for_end(started, 1)


def test_a_server_that_dies_is_reported_and_started_again_on_its_ports(tmp_path: Path) -> None:
    with supervisor(write_deployment(tmp_path)) as process:
        address = read_until(process, "serving ").partition("HTTP ")[2].partition(",")[0]
        started = commands_naming(tmp_path)
        regions = regions_of(started)
        (server_pid,) = (pid for pid, program in started.items() if program.endswith("/tritonserver"))
        os.kill(server_pid, signal.SIGKILL)
        read_until(process, "the server died (signal SIGKILL); starting it again")
        read_until(process, "serving again")
        wait_for_end(started, 1)
        assert get(f"{address}/v2")
        process.terminate()
        process.communicate(timeout=15)
    assert process.returncode == 0
    assert not [region for region in regions if region.exists()]


def test_a_stub_that_hangs_does_not_hold_up_the_stop_for_long(tmp_path: Path) -> None:
    options = dataclasses.replace(write_deployment(tmp_path), exit_timeout=1)
    with TritonServer(options) as hanging:
        hanging.wait_ready(120)
        started = commands_naming(tmp_path)
        regions = regions_of(started)
        for pid, program in started.items():
            if program.endswith("_stub"):
                os.kill(pid, signal.SIGSTOP)
        hanging.stop()
    assert hanging.exit_reason() == "exit code 1"  # Triton gave up on them
    wait_for_end(started, 1)
    assert not [region for region in regions if region.exists()]


def test_a_killed_supervisor_takes_the_server_along(tmp_path: Path) -> None:
    with supervisor(write_deployment(tmp_path)) as process:
        read_until(process, "serving ")
        started = commands_naming(tmp_path)
        regions = regions_of(started)
        process.kill()
    wait_for_end(started, 15)
    assert not [region for region in regions if region.exists()]


def test_a_taken_port_ends_the_command_in_one_line(tmp_path: Path, server: TritonServer) -> None:
    with supervisor(write_deployment(tmp_path), "--http-port", str(server.launch.ports.http)) as process:
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 2
    assert errors.startswith(f"error: http port {server.launch.ports.http} on 127.0.0.1 is taken: ")
    assert errors.count("\n") == 1
    assert "HTTP_PORT=" in errors


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started = TritonServer(write_deployment(tmp_path))
    starter = threading.Thread(target=started.start)
    starter.start()
    starter.join()
    try:
        started.wait_ready(120)
    finally:
        started.stop()
    assert started.returncode == 0
