"""Where a command's files go: whole, through links, into pipes, and under the longest names."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffuserve.errors import InvalidArgumentError
from diffuserve_client._files import check_writable, write_atomically


def test_a_link_stays_one_and_what_it_names_is_written(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link.png").symlink_to("there/a.png")
    for data in (b"first", b"second"):
        check_writable(tmp_path / "link.png")
        write_atomically(tmp_path / "link.png", data)
        assert (tmp_path / "link.png").is_symlink()
        assert (there / "a.png").read_bytes() == data
    assert [path.name for path in there.iterdir()] == ["a.png"]
    (tmp_path / "astray.png").symlink_to("nowhere/a.png")
    with pytest.raises(InvalidArgumentError, match=r"the folder .*/nowhere does not exist; create it first"):
        check_writable(tmp_path / "astray.png")


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write_atomically(pipe, b"through")
        assert read.result(20) == b"through"
    assert pipe.is_fifo()


def test_a_device_stays_one() -> None:
    check_writable(Path(os.devnull))
    write_atomically(Path(os.devnull), b"gone")
    assert Path(os.devnull).is_char_device()


def test_stdout_is_written_to_in_its_turn_wherever_it_goes(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from diffuserve_client._files import check_writable, write_atomically\n"
        "print('before', flush=True)\n"
        "check_writable(Path('/dev/stdout'))\n"
        "write_atomically(Path('/dev/stdout'), b'data ')\n"
        "print('after')\n"
    )
    with (tmp_path / "file").open("wb") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == "before\ndata after\n"
    piped = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60)
    assert piped.stdout == b"before\ndata after\n"


def test_a_name_is_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    longest = tmp_path / f"{'é' * 125}a.png"
    assert len(longest.name.encode()) == 255
    check_writable(longest)
    write_atomically(longest, b"picture")
    assert longest.read_bytes() == b"picture"
    with pytest.raises(InvalidArgumentError, match=r"has 256 bytes, more than a file's may; choose a shorter one"):
        check_writable(tmp_path / f"a{longest.name}")
