from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from diffuserve.server import ServerSetupError
from diffuserve.server.interpreter import Interpreter, library_folder

GOOD = Interpreter(
    version=(3, 11),
    system="linux",
    machine="x86_64",
    glibc=(2, 36),
    numpy="1.26.4",
    library_folders=(Path("/nowhere/lib"),),
    loader_libraries=frozenset({"libpython3.11.so.1.0"}),
)


def test_a_libpython_that_the_loader_knows_needs_no_folder() -> None:
    assert library_folder(GOOD) is None


def test_the_interpreters_own_libpython_comes_first(tmp_path: Path) -> None:
    (tmp_path / "libpython3.11.so.1.0").touch()
    assert library_folder(dataclasses.replace(GOOD, library_folders=(Path("/nowhere"), tmp_path))) == tmp_path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"loader_libraries": frozenset({"libpython3.12.so.1.0"})}, r"libpython3\.11\.so\.1\.0.*/nowhere/lib.*apt-get"),
        ({"system": "darwin", "machine": "arm64"}, "linux x86_64, and this is darwin arm64"),
        ({"machine": "aarch64"}, "linux x86_64, and this is linux aarch64"),
        ({"glibc": (2, 31)}, r"glibc 2\.35 or later, and this is 2\.31"),
        ({"glibc": ()}, r"glibc 2\.35 or later, and this is another C library"),
        ({"version": (3, 9)}, r"Python 3\.10 to 3\.12, and this is 3\.9"),
        ({"version": (3, 13)}, r"Python 3\.10 to 3\.12, and this is 3\.13"),
        ({"numpy": "2.1.0"}, r"numpy 2\.1\.0 is installed.*pip install 'numpy<2'"),
        ({"numpy": None}, r"numpy is not installed.*pip install 'numpy<2'"),
    ],
)
def test_what_the_stub_cannot_run_is_refused_in_one_line(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ServerSetupError, match=expected) as caught:
        library_folder(dataclasses.replace(GOOD, **changed))
    assert "\n" not in str(caught.value)


def test_this_interpreter_is_described(tmp_path: Path) -> None:
    (tmp_path / "libpython9.9.so.1.0").touch()
    current = Interpreter.current({"PATH": os.defpath, "LD_LIBRARY_PATH": str(tmp_path)})
    assert current.version == sys.version_info[:2]
    assert current.system == sys.platform
    assert current.libpython == f"libpython{current.version[0]}.{current.version[1]}.so.1.0"
    assert current.numpy is not None
    assert "libpython9.9.so.1.0" in current.loader_libraries
    assert Path(sys.base_prefix) / "lib" in current.library_folders
