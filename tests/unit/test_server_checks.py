from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffuserve.server import ServerOptions, ServerSetupError
from diffuserve.server.checks import address_of, check_model_repository, claim_ports, component_models, config_name
from diffuserve.server.options import GPU_CONFIG
from unit.fakes import write_deployment

FREE = ServerOptions(Path("deployment"), http_port=0, grpc_port=0, metrics_port=0)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_ports_of_zero_become_three_free_ones() -> None:
    ports = claim_ports("127.0.0.1", FREE)
    assert len(set(ports)) == 3
    assert all(ports)
    again = ServerOptions(Path("deployment"), http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics)
    assert claim_ports("127.0.0.1", again) == ports


@pytest.mark.parametrize(
    ("name", "variable", "flag"),
    [
        ("http_port", "HTTP_PORT=", "--http-port"),
        ("grpc_port", "GRPC_PORT=", "--grpc-port"),
        ("metrics_port", "METRICS_PORT=", "--metrics-port"),
    ],
)
def test_a_taken_port_is_named_with_its_remedy(taken_port: int, name: str, variable: str, flag: str) -> None:
    options = dataclasses.replace(FREE, **{name: taken_port})  # type: ignore[arg-type]  # a port, whichever it is
    with pytest.raises(ServerSetupError, match=f"port {taken_port} on 127.0.0.1 is taken") as caught:
        claim_ports("127.0.0.1", options)
    assert variable in str(caught.value)
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_ports_are_refused() -> None:
    with pytest.raises(ServerSetupError, match="must differ, and are 8000, 8000 and 8002"):
        claim_ports("127.0.0.1", ServerOptions(Path("deployment"), grpc_port=8000))


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ServerSetupError, match=f"http port {port} is not between 0 and 65535"):
        claim_ports("127.0.0.1", ServerOptions(Path("deployment"), http_port=port, grpc_port=0, metrics_port=0))


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(ServerSetupError, match=r"cannot be bound on 192\.0\.2\.1 .*--host"):
        claim_ports("192.0.2.1", FREE)


def test_hosts_become_addresses() -> None:
    assert address_of("127.0.0.1") == "127.0.0.1"
    assert address_of("0.0.0.0") == "0.0.0.0"


def test_an_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str) -> str:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(ServerSetupError, match=r"host 'elsewhere' .*--host"):
        address_of("elsewhere")


def add_model(folder: Path, name: str) -> None:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(f'name: "{name}"\n')


def test_a_deployment_lists_its_models(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        add_model(tmp_path / "models", name)
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "deployment.json").write_text("{}")
    assert component_models(tmp_path) == ("text_encoder", "unet")


def test_what_is_missing_from_a_deployment_is_said(tmp_path: Path) -> None:
    missing = tmp_path / "shapes"
    with pytest.raises(ServerSetupError, match=rf"no deployment at {missing}: .*`make export .*OUT={missing}`"):
        component_models(missing)
    missing.mkdir()
    with pytest.raises(ServerSetupError, match=r"holds no deployment\.json: .*make export"):
        component_models(missing)
    (missing / "deployment.json").write_text("{}")
    with pytest.raises(ServerSetupError, match=r"holds no models .*make export"):
        component_models(missing)


def test_a_component_may_not_have_the_public_name(tmp_path: Path) -> None:
    add_model(tmp_path / "models", "diffusion")
    (tmp_path / "deployment.json").write_text("{}")
    with pytest.raises(ServerSetupError, match="public model's name"):
        component_models(tmp_path)


def test_the_model_repository_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ServerSetupError, match=r"holds no diffusion/config\.pbtxt: .*--model-repository"):
        check_model_repository(tmp_path, ("unet",))
    add_model(tmp_path, "diffusion")
    check_model_repository(tmp_path, ("unet",))
    add_model(tmp_path, "unet")
    with pytest.raises(ServerSetupError, match="'unet' is in the deployment and in"):
        check_model_repository(tmp_path, ("unet",))


def test_folders_have_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFUSERVE_CACHE", raising=False)
    assert FREE.cache_folder() == tmp_path / "build/cache"
    monkeypatch.setenv("DIFFUSERVE_CACHE", str(tmp_path / "elsewhere"))
    assert FREE.cache_folder() == tmp_path / "elsewhere"
    add_model(tmp_path / "model_repository", "diffusion")
    assert FREE.repository_folder() == tmp_path / "model_repository"
    given = ServerOptions(Path("deployment"), cache=Path("cache"), model_repository=Path("models"))
    assert (given.cache_folder(), given.repository_folder()) == (tmp_path / "cache", tmp_path / "models")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("onnxruntime-cpu",), ""),
        (("tensorrt",), GPU_CONFIG),
        (("tensorrt-rtx", "onnxruntime"), GPU_CONFIG),
        (("tensorrt", "onnxruntime-cpu"), ""),  # refused by the public model
    ],
)
def test_the_configuration_follows_from_the_device(tmp_path: Path, targets: tuple[str, ...], expected: str) -> None:
    names = [f"x{index}" for index in range(len(targets))]
    deployment = write_deployment(tmp_path, *names)
    for name, target in zip(names, targets, strict=True):
        manifest = dataclasses.replace(deployment.manifest(name), target=target)
        (deployment.folder(name) / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    assert config_name(tmp_path) == expected


def test_a_deployment_that_cannot_be_read_is_the_models_to_report(tmp_path: Path) -> None:
    assert config_name(tmp_path) == ""
