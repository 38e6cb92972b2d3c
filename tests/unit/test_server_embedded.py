from __future__ import annotations

import dataclasses
import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffuserve.server import ServerSetupError, embedded
from diffuserve.server.embedded import embedded_triton, find_triton, pip_download
from diffuserve.server.interpreter import Interpreter

WHEEL = "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl"
INTERPRETER = Interpreter(
    version=(3, 11),
    system="linux",
    machine="x86_64",
    glibc=(2, 36),
    numpy="1.26.4",
    library_folders=(),
    loader_libraries=frozenset({"libpython3.11.so.1.0", "libpython3.12.so.1.0"}),
)


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


class FakeIndex:
    """Stands in for pip: hands out a small wheel with the files that matter."""

    def __init__(self, folder: Path) -> None:
        self.downloads = 0
        self.wheel = folder / WHEEL
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name in (
                "bin/tritonserver",
                "backends/python/libtriton_python.so",
                "backends/python/triton_python_backend_utils.py",
                "caches/local/libtritoncache_local.so",
                "python_backend_stubs/3.10/triton_python_backend_stub",
                "python_backend_stubs/3.11/triton_python_backend_stub",
            ):
                archive.writestr(f"pytriton/tritonserver/{name}", name)
            archive.writestr("nvidia_pytriton.libs/libssl.so.3", "library")
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()

    def __call__(self, folder: Path) -> None:
        self.downloads += 1
        (folder / WHEEL).write_bytes(self.wheel.read_bytes())


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    return FakeIndex(tmp_path)


def test_the_wheel_is_fetched_and_unpacked_once(tmp_path: Path, index: FakeIndex) -> None:
    cache = tmp_path / "cache"
    first = embedded_triton(cache, INTERPRETER, index, index.sha256)
    assert first.embedded
    assert first.backends is not None
    stub = first.backends / "python/triton_python_backend_stub"
    assert stub.read_text() == "python_backend_stubs/3.11/triton_python_backend_stub"
    assert stub.stat().st_mode & 0o111
    assert first.binary.stat().st_mode & 0o111
    assert (first.binary.parents[3] / "nvidia_pytriton.libs/libssl.so.3").is_file()
    assert embedded_triton(cache, INTERPRETER, index, index.sha256) == first
    assert index.downloads == 1
    assert not [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_an_incomplete_folder_is_unpacked_again(tmp_path: Path, index: FakeIndex) -> None:
    first = embedded_triton(tmp_path / "cache", INTERPRETER, index, index.sha256)
    first.binary.unlink()
    assert embedded_triton(tmp_path / "cache", INTERPRETER, index, index.sha256).binary.is_file()
    assert index.downloads == 1


def test_a_damaged_wheel_in_the_cache_is_fetched_again(tmp_path: Path, index: FakeIndex) -> None:
    damaged = tmp_path / "cache/wheels" / WHEEL
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a wheel")
    embedded_triton(tmp_path / "cache", INTERPRETER, index, index.sha256)
    assert damaged.read_bytes() == index.wheel.read_bytes()


def test_another_wheel_is_refused(tmp_path: Path, index: FakeIndex) -> None:
    with pytest.raises(ServerSetupError, match=f"has SHA-256 {index.sha256[:16]}"):
        embedded_triton(tmp_path / "cache", INTERPRETER, index)
    assert not (tmp_path / "cache/wheels" / WHEEL).exists()


def test_a_fetch_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerSetupError, match=f"pip fetched nothing instead of {WHEEL}"):
        embedded_triton(tmp_path / "cache", INTERPRETER, lambda _folder: None)


def test_a_wheel_without_a_stub_for_this_python_is_refused(tmp_path: Path, index: FakeIndex) -> None:
    newer = dataclasses.replace(INTERPRETER, version=(3, 12))
    with pytest.raises(ServerSetupError, match=r"holds no server for Python 3\.12"):
        embedded_triton(tmp_path / "cache", newer, index, index.sha256)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, index: FakeIndex) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ServerSetupError, match=r"cannot be unpacked into .*DIFFUSERVE_CACHE"):
        embedded_triton(tmp_path / "cache", INTERPRETER, index, index.sha256)


def test_an_interpreter_that_the_stub_cannot_run_fetches_nothing(tmp_path: Path, index: FakeIndex) -> None:
    with pytest.raises(ServerSetupError, match=r"libpython3\.11\.so\.1\.0"):
        embedded_triton(
            tmp_path / "cache", dataclasses.replace(INTERPRETER, loader_libraries=frozenset()), index, index.sha256
        )
    assert index.downloads == 0


def test_a_failing_pip_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip = make_program(tmp_path / "python")
    no_pip.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    monkeypatch.setattr(sys, "executable", str(no_pip))
    with pytest.raises(ServerSetupError, match=r"nvidia-pytriton==0\.7\.0` failed \(No module named pip\)") as caught:
        pip_download(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_named_server_is_taken_with_its_backends(tmp_path: Path) -> None:
    binary = make_program(tmp_path / "opt/bin/server")
    assert find_triton(tmp_path, {"TRITONSERVER": str(binary), "PATH": ""}).backends is None
    (tmp_path / "opt/backends").mkdir()
    found = find_triton(tmp_path, {"TRITONSERVER": str(binary), "PATH": ""})
    assert (found.binary, found.backends, found.embedded) == (binary, tmp_path / "opt/backends", False)


@pytest.mark.parametrize("make", [lambda _path: None, Path.mkdir, Path.touch], ids=["missing", "folder", "text"])
def test_a_named_server_that_is_no_program_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    named = tmp_path / "tritonserver"
    make(named)
    with pytest.raises(ServerSetupError, match=rf"TRITONSERVER={named} is not an executable file: .*unset it"):
        find_triton(tmp_path, {"TRITONSERVER": str(named)})


def test_an_installed_server_comes_before_the_embedded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = make_program(tmp_path / "standard/tritonserver")
    on_path = make_program(tmp_path / "path/tritonserver")
    nowhere = tmp_path / "nowhere"
    assert find_triton(tmp_path, {"PATH": str(on_path.parent)}, standard=standard).binary == on_path
    assert find_triton(tmp_path, {"PATH": str(nowhere)}, standard=standard).binary == standard
    monkeypatch.setattr(embedded, "embedded_triton", lambda cache, _interpreter: embedded.Triton(cache, None, True))
    assert find_triton(tmp_path, {"PATH": str(nowhere)}, standard=nowhere).embedded
