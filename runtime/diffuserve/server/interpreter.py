"""Whether the embedded server's Python backend can run this interpreter.

The backend starts a stub: a program linked against one version of libpython, which then finds this interpreter's
packages through the `python3` that is first on PATH.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from diffuserve.server.errors import ServerSetupError

__all__ = ["STUB_VERSIONS", "Interpreter", "library_folder"]

STUB_VERSIONS = ((3, 10), (3, 11), (3, 12))
_GLIBC = (2, 35)
_INSTEAD = "or set TRITONSERVER to the tritonserver of another installation"


@dataclass(frozen=True)
class Interpreter:
    """The facts that the checks ask about."""

    version: tuple[int, int]
    system: str
    machine: str
    glibc: tuple[int, ...]
    """Empty where the C library is another one."""
    numpy: str | None
    library_folders: tuple[Path, ...]
    """Where this interpreter's own libpython would be."""
    loader_libraries: frozenset[str]
    """The libpython files that the dynamic loader finds by itself."""

    @classmethod
    def current(cls, environment: Mapping[str, str]) -> Interpreter:
        """The interpreter that runs this."""
        library, glibc = platform.libc_ver()
        return cls(
            version=sys.version_info[:2],
            system=sys.platform,
            machine=platform.machine(),
            glibc=tuple(int(part) for part in glibc.split(".")[:2]) if library == "glibc" else (),
            numpy=_installed_version("numpy"),
            library_folders=_own_library_folders(),
            loader_libraries=_loader_libraries(environment),
        )

    @property
    def libpython(self) -> str:
        """The file that the stub is linked against."""
        return "libpython{}.{}.so.1.0".format(*self.version)


def library_folder(interpreter: Interpreter) -> Path | None:
    """Check everything, and return the folder to add to LD_LIBRARY_PATH; None where the loader needs no help."""
    _check_platform(interpreter)
    _check_numpy(interpreter)
    for folder in interpreter.library_folders:
        if (folder / interpreter.libpython).is_file():
            return folder
    if interpreter.libpython in interpreter.loader_libraries:
        return None
    looked = ", ".join(str(folder) for folder in interpreter.library_folders)
    package = "libpython{}.{}".format(*interpreter.version)
    raise ServerSetupError(
        f"{interpreter.libpython}, which Triton's Python backend needs, is neither in {looked} nor known to ldconfig: "
        f"install it (apt-get install {package}), or use a Python that was built with --enable-shared"
    )


def _check_platform(interpreter: Interpreter) -> None:
    if (interpreter.system, interpreter.machine) != ("linux", "x86_64"):
        raise ServerSetupError(
            f"the embedded Triton runs on linux x86_64, and this is {interpreter.system} {interpreter.machine}: "
            f"use the container, {_INSTEAD}"
        )
    if interpreter.glibc < _GLIBC:
        found = ".".join(str(part) for part in interpreter.glibc) or "another C library"
        raise ServerSetupError(
            "the embedded Triton needs glibc {}.{} or later, and this is {}: use a newer distribution, {}".format(
                *_GLIBC, found, _INSTEAD
            )
        )
    if interpreter.version not in STUB_VERSIONS:
        found, first, last = (
            "{}.{}".format(*version) for version in (interpreter.version, STUB_VERSIONS[0], STUB_VERSIONS[-1])
        )
        raise ServerSetupError(
            f"the embedded Triton runs Python {first} to {last}, and this is {found}: "
            f"make the virtual environment with one of those, {_INSTEAD}"
        )


def _check_numpy(interpreter: Interpreter) -> None:
    remedy = f"run `{sys.executable} -m pip install 'numpy<2'`"
    if interpreter.numpy is None:
        raise ServerSetupError(f"numpy is not installed, and Triton's Python backend needs it: {remedy}")
    if int(interpreter.numpy.split(".")[0]) >= 2:
        raise ServerSetupError(
            f"numpy {interpreter.numpy} is installed, and the embedded Triton makes empty tensors from arrays "
            f"of numpy 2 or later: {remedy}"
        )


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _own_library_folders() -> tuple[Path, ...]:
    folders = [Path(sys.base_prefix) / "lib"]
    configured = sysconfig.get_config_var("LIBDIR")
    if configured:
        folders.insert(0, Path(configured))
    return tuple(dict.fromkeys(folders))


def _loader_libraries(environment: Mapping[str, str]) -> frozenset[str]:
    search_path = os.pathsep.join((environment.get("PATH", os.defpath), "/sbin", "/usr/sbin"))
    ldconfig = shutil.which("ldconfig", path=search_path)
    names = set()
    if ldconfig:
        listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=30, check=False).stdout
        names = {line.split()[0] for line in listing.splitlines() if line.lstrip().startswith("libpython")}
    for folder in filter(None, environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        names.update(path.name for path in Path(folder).glob("libpython*"))
    return frozenset(names)
