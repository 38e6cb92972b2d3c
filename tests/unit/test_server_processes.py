"""Processes as /proc shows them, over shells that look like the Python backend's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from diffuserve.server.processes import ModelProcess, members

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def start(
            instance: str, group: int = 0, program: str = "/b/triton_python_backend_stub"
        ) -> subprocess.Popen[bytes]:
            command = [program, "-c", "read _", "/models/1/model.py", instance, "DEFAULT"]
            join = partial(os.setpgid, 0, group)
            child = subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE, preexec_fn=join)
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def dead(child: subprocess.Popen[bytes]) -> None:
    """Killed, and not asked for its exit code: what Triton leaves of a stub."""
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def test_a_model_s_process_is_gone_once_it_was_there_and_died(start: Start) -> None:
    leader = start("", program="tritonserver")
    watched = ModelProcess(leader.pid, "diffusion")
    others = [start(name, leader.pid) for name in ("diffusion_unet_0_0", "my_diffusion_0_0")]
    assert not watched.is_gone(), "it was not there yet"
    first = start("diffusion_0_0", leader.pid)
    assert not watched.is_gone()
    dead(others[0])
    assert not watched.is_gone()
    dead(first)
    assert watched.is_gone()
    assert watched.is_gone()
    start("diffusion_0_0")
    assert watched.is_gone(), "that one is another server's"
    start("diffusion_0_0", leader.pid)
    assert not watched.is_gone(), "the model was loaded again"


def test_members_of_a_group_are_those_that_live(start: Start) -> None:
    leader = start("", program="a name) with (brackets")
    other = start("a_0_0", leader.pid)
    assert sorted(members(leader.pid)) == sorted([leader.pid, other.pid])
    dead(leader)
    assert members(leader.pid) == [other.pid]
    dead(other)
    assert members(leader.pid) == []
