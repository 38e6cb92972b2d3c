from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffuserve.server import ServerOptions, ServerSetupError, TritonServer, process
from diffuserve.server.__main__ import _Signals, main, settings_from
from diffuserve.server.checks import Ports
from diffuserve.server.embedded import Triton
from diffuserve.server.launch import command_line, prepare, server_environment
from diffuserve.wire import decode_operation

EMBEDDED = Triton(Path("/triton/bin/tritonserver"), Path("/triton/backends"), True, Path("/python/lib"))
OPTIONS = ServerOptions(Path("/deployments/shapes"), model_repository=Path("/models"))
PORTS = Ports(http=8000, grpc=8001, metrics=8002)


def compose(triton: Triton = EMBEDDED, options: ServerOptions = OPTIONS) -> tuple[str, ...]:
    return command_line(triton, options, "127.0.0.1", PORTS, ("shapes_unet", "diffusion"), "id-1")


def test_the_command_line_names_both_repositories_and_every_model() -> None:
    command = compose()
    assert command[0] == "/triton/bin/tritonserver"
    assert [part for part in command if part.startswith("--model-repository=")] == [
        "--model-repository=/deployments/shapes/models",
        "--model-repository=/models",
    ]
    assert [part for part in command if part.startswith("--load-model=")] == [
        "--load-model=shapes_unet",
        "--load-model=diffusion",
    ]
    assert "--model-control-mode=explicit" in command


def test_every_endpoint_is_bound_to_the_address() -> None:
    command = compose()
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        assert f"--{name}-address=127.0.0.1" in command
        assert f"--{name}-port={port}" in command


def test_each_server_has_its_own_shared_memory_and_no_response_cache() -> None:
    command = compose()
    assert "--backend-config=python,shm-region-prefix-name=id-1-" in command
    assert "--id=id-1" in command
    assert not [part for part in command if "cache" in part]


def test_only_the_embedded_server_is_told_that_it_has_no_gpu() -> None:
    assert "--allow-gpu-metrics=false" in compose()
    assert "--backend-directory=/triton/backends" in compose()
    installed = compose(Triton(Path("/usr/bin/tritonserver"), None))
    assert not [part for part in installed if part.startswith(("--allow-gpu", "--pinned", "--backend-directory"))]


def test_a_gpu_deployment_names_its_configuration() -> None:
    arguments = (EMBEDDED, OPTIONS, "127.0.0.1", PORTS, ("diffusion",), "id-1")
    assert "--model-config-name=gpu" in command_line(*arguments, "gpu")
    assert not [part for part in command_line(*arguments) if part.startswith("--model-config-name")]


def test_further_arguments_come_last() -> None:
    options = ServerOptions(Path("/deployment"), triton_arguments=("--log-verbose=1",))
    assert compose(options=options)[-1] == "--log-verbose=1"


def test_the_environment_leads_the_stubs_to_this_interpreter() -> None:
    inherited = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/cuda", "HOME": "/home/user"}
    options = ServerOptions(Path("/deployment"), embeddings=Path("/embeddings"), environment={"OMP_NUM_THREADS": "1"})
    environment = server_environment(EMBEDDED, options, Path("/deployment"), inherited)
    assert environment == {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin",
        "LD_LIBRARY_PATH": f"/python/lib{os.pathsep}/cuda",
        "HOME": "/home/user",
        "DIFFUSERVE_DEPLOYMENT": "/deployment",
        "DIFFUSERVE_EMBEDDINGS": "/embeddings",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "4194304",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
        **options.sharing.environment(),
    }
    installed = server_environment(Triton(Path("/tritonserver"), None), options, Path("/deployment"), {})
    assert "LD_LIBRARY_PATH" not in installed
    chosen = server_environment(EMBEDDED, options, Path("/deployment"), {"MALLOC_ARENA_MAX": "8"})
    assert (chosen["MALLOC_ARENA_MAX"], chosen["MALLOC_TRIM_THRESHOLD_"]) == ("8", "1000000")


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    for folder in (tmp_path / "shapes/models/shapes_unet", tmp_path / "model_repository/diffusion"):
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").touch()
    (tmp_path / "shapes/deployment.json").write_text("{}")
    return tmp_path / "shapes"


def fake_server(tmp_path: Path, script: str) -> dict[str, str]:
    binary = tmp_path / "tritonserver"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    return {**os.environ, "TRITONSERVER": str(binary)}


def test_two_starts_differ_where_they_must(tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ServerOptions(Path("shapes"), http_port=0, grpc_port=0, metrics_port=0, cache=tmp_path)
    first, second = (prepare(options, fake_server(tmp_path, "exit")) for _ in range(2))
    assert first.shm_prefix != second.shm_prefix
    assert first.models == ("shapes_unet", "diffusion")
    assert first.log_file == tmp_path / f"logs/triton-{first.ports.http}.log"
    assert first.environment["DIFFUSERVE_DEPLOYMENT"] == str(deployment)
    assert first.environment["DIFFUSERVE_HTTP_URL"] == f"http://127.0.0.1:{first.ports.http}"


def options_for(deployment: Path) -> ServerOptions:
    return ServerOptions(
        deployment,
        model_repository=deployment.parent / "model_repository",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=deployment.parent / "server.log",
    )


def test_a_server_that_dies_at_once_is_reported_with_its_log(
    tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", fake_server(tmp_path, "echo 'E1122 no such luck'; exit 3"))
    with TritonServer(options_for(deployment)) as server:
        with pytest.raises(RuntimeError, match=r"died before it was ready \(exit code 3\)(.|\n)*no such luck"):
            server.wait_ready(60)
        assert server.returncode == 3
    assert server.log_file.read_text() == "E1122 no such luck\n"


def test_a_server_that_never_serves_runs_into_the_timeout(
    tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", fake_server(tmp_path, "exec sleep 60"))
    with TritonServer(options_for(deployment)) as server:
        with pytest.raises(RuntimeError, match=r"not ready after 0\.3 s"):
            server.wait_ready(0.3)
        assert server.wait(0) is None
    assert server.exit_reason() == "signal SIGTERM"


def test_a_server_that_ignores_the_signal_is_killed_with_its_children(
    tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = f"trap '' TERM; sleep 60 & echo $! > {pipe}; wait; sleep 60"
    monkeypatch.setattr(os, "environ", fake_server(tmp_path, script))
    monkeypatch.setattr(process, "_KILL_AFTER", 0.2)
    with TritonServer(dataclasses.replace(options_for(deployment), exit_timeout=0)) as server:
        child = os.pidfd_open(int(pipe.read_text()))
    assert server.exit_reason() == "signal SIGKILL"
    assert select.select([child], [], [], 10)[0]
    os.close(child)


def test_children_that_a_server_leaves_are_not_kept_as_zombies(tmp_path: Path, deployment: Path) -> None:
    """In a process that inherits orphans, as process 1 of a container does."""
    program = f"""
import ctypes, os, pathlib
from diffuserve.server import ServerOptions, TritonServer
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
deployment = pathlib.Path({str(deployment)!r})
options = ServerOptions(deployment, model_repository=deployment.parent / "model_repository", http_port=0, grpc_port=0,
                        metrics_port=0, log_file=deployment / "log")
with TritonServer(options) as server:
    server.wait(10)
print(pathlib.Path(f"/proc/self/task/{{os.getpid()}}/children").read_text())
"""
    environment = fake_server(tmp_path, "sleep 60 & sleep 60 & exit 0")
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == ""


def test_a_server_is_started_once(tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", fake_server(tmp_path, "exec sleep 60"))
    server = TritonServer(options_for(deployment))
    server.stop()
    with pytest.raises(RuntimeError, match="was not started"):
        _ = server.grpc_url
    with server, pytest.raises(RuntimeError, match="was started before"):
        server.start()
    server.stop()


def test_a_program_that_cannot_run_is_reported(
    tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = fake_server(tmp_path, "")
    (tmp_path / "tritonserver").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(RuntimeError, match=r"tritonserver cannot be run: .*Exec format error"):
        TritonServer(options_for(deployment)).start()


def test_a_log_that_cannot_be_written_is_named(
    tmp_path: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", fake_server(tmp_path, "exit"))
    (tmp_path / "server.log").mkdir()
    with pytest.raises(ServerSetupError, match=r"server\.log cannot be written .*--log-file"):
        TritonServer(options_for(deployment)).start()


def test_the_server_needs_the_standard_library_only() -> None:
    # What the interpreter has loaded by itself (.pth files of the environment) does not count.
    program = """
import sys
before = set(sys.modules)
import diffuserve.server.__main__
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - sys.stdlib_module_names - {"diffuserve"}))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_a_failed_check_ends_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--deployment", str(tmp_path / "none")]) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: there is no deployment at")
    assert written.count("\n") == 1


def test_flags_become_options() -> None:
    line = (
        "--deployment d --model-repository m --host 0.0.0.0 --http-port 1 --grpc-port 2 --metrics-port 3 --cache c "
        "--log-file l --verbose --start-timeout 4 --exit-timeout 5 "
        "--triton-argument=--log-verbose=1 --triton-argument=--http-thread-count=2"
    )
    parsed, _ = settings_from(line.split())
    assert parsed == ServerOptions(
        deployment=Path("d"),
        model_repository=Path("m"),
        host="0.0.0.0",
        http_port=1,
        grpc_port=2,
        metrics_port=3,
        cache=Path("c"),
        log_file=Path("l"),
        echo="everything",
        start_timeout=4.0,
        exit_timeout=5,
        triton_arguments=("--log-verbose=1", "--http-thread-count=2"),
    )
    assert settings_from(["--deployment", "d"])[0] == ServerOptions(Path("d"), echo="warnings")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--grace", "3600.5", "is 3600.5, and must be from 0 to 3600"),
        ("--grace", "-1", "must be from 0"),
        ("--grace", "nan", "is nan"),
        ("--stall-timeout", "nan", "is nan"),
        ("--start-timeout", "-1", "must be from 1"),
        ("--exit-timeout", "-3", "must be from 0"),
        ("--lora-budget-mb", "0", "must be from 1"),
        ("--memory-budget", "inf", "is inf"),
        ("--memory-budget", "0", "must be above 0"),
        ("--idle-release", "nan", "must be a number"),
    ],
)
def test_values_out_of_range_are_refused_before_the_start(
    flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--deployment", "d", flag, value]) == 2
    written = capsys.readouterr().err
    assert said in written
    assert written.count("\n") == 1


def test_the_most_grace_is_what_a_drain_takes() -> None:
    _, patience = settings_from(["--deployment", "d", "--grace", "3600"])
    given = {"token": "t", "grace_ms": round(1000 * patience.grace)}
    operation = decode_operation({"operation": np.array([b"drain"], dtype=object)}, given)
    assert operation is not None
    assert operation.grace_s == patience.grace


def test_the_command_line_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERVE_IDLE_RELEASE_S", "60")
    monkeypatch.setenv("DIFFUSERVE_LOADS_A_MINUTE", "3")

    def gets(*flags: str) -> tuple[str, str]:
        options, _ = settings_from(["--deployment", "d", *flags])
        environment = server_environment(EMBEDDED, options, Path("/d"), os.environ)
        return environment["DIFFUSERVE_IDLE_RELEASE_S"], environment["DIFFUSERVE_LOADS_A_MINUTE"]

    assert gets() == ("60.0", "3")
    assert gets("--idle-release", "15") == ("900.0", "3")
    assert gets("--loads-per-minute", "12") == ("60.0", "12")


def test_the_first_signal_interrupts_and_a_later_one_kills() -> None:
    now, killed = [0.0], list[float]()
    with _Signals(lambda: killed.append(now[0]), lambda: now[0]):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            assert isinstance(signal.getsignal(number), _Signals)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        for now[0] in (0.1, 0.4):
            os.kill(os.getpid(), signal.SIGTERM)  # of make, which was told as well
        assert killed == []
        now[0] = 0.6
        os.kill(os.getpid(), signal.SIGINT)
        assert killed == [0.6]


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _Signals(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
