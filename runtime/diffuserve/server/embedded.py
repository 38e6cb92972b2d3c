"""Finding a tritonserver, and where there is none, fetching the one that a PyPI wheel carries.

The wheel holds the server, its Python backend and a stub for each Python version. It predates the security fixes of
Triton's later releases: it is for loopback, development and tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffuserve.server.errors import ServerSetupError
from diffuserve.server.interpreter import Interpreter, library_folder

__all__ = ["Triton", "embedded_triton", "find_triton"]

REQUIREMENT = "nvidia-pytriton==0.7.0"
_WHEEL = "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl"
_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
_SERVER = "pytriton/tritonserver"
_LIBRARIES = "nvidia_pytriton.libs/"
_LICENSE = "nvidia_pytriton-0.7.0.dist-info/licenses/"

_LOG = logging.getLogger(__name__)

Download = Callable[[Path], None]
"""Puts the wheel into a folder."""


@dataclass(frozen=True)
class Triton:
    """A tritonserver that can be started."""

    binary: Path
    backends: Path | None
    """None where the binary knows its own backends."""
    embedded: bool = False
    library_folder: Path | None = None
    """To be added to LD_LIBRARY_PATH."""


def find_triton(
    cache: Path,
    environment: Mapping[str, str],
    *,
    standard: Path = Path("/opt/tritonserver/bin/tritonserver"),
) -> Triton:
    """The server that TRITONSERVER names, else an installed one, else the embedded one."""
    named = environment.get("TRITONSERVER")
    if named:
        if not _is_program(Path(named)):
            raise ServerSetupError(
                f"TRITONSERVER={named} is not an executable file: "
                "name a tritonserver binary, or unset it to use the embedded one"
            )
        return _installed(Path(named))
    on_path = shutil.which("tritonserver", path=environment.get("PATH", os.defpath))
    if on_path:
        return _installed(Path(on_path))
    if _is_program(standard):
        return _installed(standard)
    return embedded_triton(cache, Interpreter.current(environment))


def _installed(binary: Path) -> Triton:
    backends = binary.resolve().parent.parent / "backends"
    return Triton(binary.absolute(), backends if backends.is_dir() else None)


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def embedded_triton(
    cache: Path, interpreter: Interpreter, download: Download | None = None, sha256: str = _SHA256
) -> Triton:
    """The wheel's server, unpacked with this Python's stub; fetched the first time."""
    folder_of_libpython = library_folder(interpreter)
    version = "{}.{}".format(*interpreter.version)
    root = cache / f"triton-{REQUIREMENT.replace('==', '-')}-py{version}"
    found = Triton(root / _SERVER / "bin/tritonserver", root / _SERVER / "backends", True, folder_of_libpython)
    if _is_complete(found):
        return found
    try:
        with _locked(cache):
            if not _is_complete(found):  # another process may have been first
                wheel = _fetched_wheel(cache, download or pip_download, sha256)
                _unpack(wheel, root, version)
    except OSError as error:
        raise ServerSetupError(
            f"the embedded Triton cannot be unpacked into {cache} ({error}): "
            "name another folder with --cache or DIFFUSERVE_CACHE"
        ) from error
    if not _is_complete(found):
        raise ServerSetupError(
            f"{_WHEEL} holds no server for Python {version}: delete {cache / 'wheels'} and try again"
        )
    return found


def _is_complete(triton: Triton) -> bool:
    assert triton.backends is not None
    python = triton.backends / "python"
    return (
        _is_program(triton.binary)
        and _is_program(python / "triton_python_backend_stub")
        and (python / "libtriton_python.so").is_file()
        and (python / "triton_python_backend_utils.py").is_file()
    )


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "triton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetched_wheel(cache: Path, download: Download, sha256: str) -> Path:
    wheel = cache / "wheels" / _WHEEL
    if wheel.is_file() and _sha256_of(wheel) == sha256:
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        _LOG.info("fetching %s", REQUIREMENT)
        download(Path(temporary))
        fetched = Path(temporary) / _WHEEL
        if not fetched.is_file():
            names = ", ".join(sorted(path.name for path in Path(temporary).iterdir())) or "nothing"
            raise ServerSetupError(f"pip fetched {names} instead of {_WHEEL}: put that wheel into {wheel.parent}")
        digest = _sha256_of(fetched)
        if digest != sha256:
            raise ServerSetupError(
                f"the fetched {_WHEEL} has SHA-256 {digest[:16]}... and must have {sha256[:16]}...: "
                f"put the right wheel into {wheel.parent}"
            )
        fetched.replace(wheel)
    return wheel


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def pip_download(folder: Path) -> None:
    """Fetch the wheel with this interpreter's pip, from wherever pip is set up to fetch."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {finished.returncode}"
        raise ServerSetupError(
            f"`python -m pip download --no-deps {REQUIREMENT}` failed ({reason}): install pip and check its index, "
            f"put {_WHEEL} into the cache's `wheels` folder, or set TRITONSERVER to an installed tritonserver"
        )


def _unpack(wheel: Path, root: Path, version: str) -> None:
    stub = f"{_SERVER}/python_backend_stubs/{version}/triton_python_backend_stub"
    wanted = (f"{_SERVER}/bin/", f"{_SERVER}/backends/", _LIBRARIES, _LICENSE, stub)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".unpack-") as temporary:
        folder = Path(temporary) / "wheel"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
        for program, mode_of in ((f"{_SERVER}/bin/tritonserver", None), (stub, f"{_SERVER}/backends/python")):
            path = folder / program
            if path.is_file():
                path.chmod(0o755)
                if mode_of:
                    path.replace(folder / mode_of / path.name)
        shutil.rmtree(root, ignore_errors=True)  # what is left of an incomplete one
        folder.replace(root)
