"""What an export's own processes have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from diffuserve_export.processes import thrifty_environment

# A large block that is freed raises glibc's limit; of the smaller ones that follow, the last one holds the others.
HOLDS = """
bytearray(30_000_000)
blocks = [bytearray(4_000_000) for _ in range(60)]
last = bytearray(4_000_000)
blocks.clear()
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]))
"""


def held(environment: Mapping[str, str]) -> int:
    """Bytes that are resident after 240 MB of weights were freed."""
    run = subprocess.run([sys.executable, "-c", HOLDS], env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and glibc's allocator")
def test_freed_memory_is_given_back() -> None:
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    assert held(usual) > 240_000_000
    assert held(thrifty_environment()) < 60_000_000


def test_an_environment_has_what_is_asked_for() -> None:
    environment = thrifty_environment(ONE="1")
    assert environment["ONE"] == "1"
    assert environment.items() >= {name: value for name, value in os.environ.items() if "MALLOC" not in name}.items()
