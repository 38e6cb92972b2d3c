from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from blocking import Blocking
from diffuserve_client import Client, Retry, Timeout
from unit.client.fake_triton import FakeTriton, Script, answer

Serve = Callable[[Script], FakeTriton]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(script: Script = answer) -> FakeTriton:
            fake = FakeTriton(script)
            stack.callback(fake.stop)
            return fake

        yield start


@pytest.fixture
def fake(serve: Serve) -> FakeTriton:
    """A server that does what is asked; a test may give it another script."""
    return serve(answer)


@pytest.fixture(params=[Client, Blocking], ids=["Client", "AsyncClient"])
def client_class(request: pytest.FixtureRequest) -> Any:
    """The class of the client: both do the same."""
    return request.param


@pytest.fixture
def client(client_class: Any, fake: FakeTriton) -> Iterator[Client]:
    # Far above what any test takes, below the tests' own limit, so that a hang is told as what it is.
    with client_class(fake.url, timeout=Timeout(total=60, connect=30), retry=Retry(retries=0)) as client:
        yield client
