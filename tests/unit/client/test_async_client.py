"""What only AsyncClient can get wrong: whose cancellation it was, and what is never awaited."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from diffuserve_client import AsyncClient, CancelledError, GenerateResult, Timeout
from unit.client.fake_triton import FakeTriton, image, progress, response, silence


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.005)


def test_a_task_is_cancelled_however_fast_events_come(fake: FakeTriton) -> None:
    def flood(fake: FakeTriton, request: Any) -> Iterator[Any]:
        return itertools.repeat(response(progress(1, 20)))  # until gRPC sees that the client is gone

    async def cancel_after(client: AsyncClient, seconds: float) -> None:
        heard = asyncio.Event()
        task = asyncio.create_task(client.generate("a", on_progress=lambda _: heard.set()))
        await heard.wait()
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait((task,), timeout=1)
        assert task.cancelled()

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            for place in range(60):
                await cancel_after(client, place * 0.0002)  # somewhere between two events

    fake.script = flood
    asyncio.run(main())


@pytest.mark.parametrize("call", ["status", "health"])
def test_a_client_that_is_closed_is_no_cancelled_task(fake: FakeTriton, call: str) -> None:
    begun = threading.Event()

    def begin(fake: FakeTriton, request: Any) -> Iterator[Any]:
        begun.set()
        yield from silence(fake, request)

    async def main() -> Any:
        client = AsyncClient(fake.url)
        task = asyncio.create_task(getattr(client, call)())
        await until(begun)
        await client.aclose()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    fake.script = begin
    outcome = asyncio.run(main())
    assert isinstance(outcome if call == "status" else outcome[0].error, CancelledError)


def test_a_result_whose_stream_does_not_end_is_no_cancelled_task(fake: FakeTriton) -> None:
    sent = threading.Event()

    def finish(fake: FakeTriton, request: Any) -> Iterator[Any]:
        yield response(image(), final=True)
        sent.set()
        yield from silence(fake, request)

    async def main() -> None:
        async with AsyncClient(fake.url, timeout=hasty) as client:
            assert isinstance(await client.generate("a"), GenerateResult), "the stall timeout ended the stream"
        fake.over.clear()
        sent.clear()
        client = AsyncClient(fake.url)
        task = asyncio.create_task(client.generate("a"))
        await until(sent)
        await client.aclose()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, (CancelledError, GenerateResult))

    fake.script = finish
    hasty = Timeout(connect=0.2)
    object.__setattr__(hasty, "stall", 0.2)  # below what a server can be asked for
    asyncio.run(main())


def test_a_coroutine_function_that_would_never_run_is_refused(fake: FakeTriton) -> None:
    async def hear(_: Any) -> None: ...

    without_types: Any = hear

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            with pytest.raises(TypeError, match="hear is a coroutine function"):
                await client.generate("a", on_progress=without_types)

    asyncio.run(main())
