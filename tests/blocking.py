"""AsyncClient with Client's calls, so that one suite tests both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Generator
from functools import lru_cache
from typing import Any, TypeVar

from diffuserve_client import AsyncClient

__all__ = ["Blocking"]

_T = TypeVar("_T")


@lru_cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for the whole process: gRPC's event loops of several threads get into each other's way."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asyncio", daemon=True).start()
    return loop


class Blocking:
    """An AsyncClient in an event loop of another thread; each call waits for what the client's returns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        async def make() -> AsyncClient:
            return AsyncClient(*arguments, **options)

        self.client = self._wait(make())
        self.urls, self.timeout, self.retry = self.client.urls, self.client.timeout, self.client.retry

    def _wait(self, awaitable: Awaitable[_T]) -> _T:
        async def run() -> _T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), _loop()).result()

    def generate(self, *arguments: Any, **options: Any) -> Any:
        return self._wait(self.client.generate(*arguments, **options))

    def resume(self, *arguments: Any, **options: Any) -> Any:
        return self._wait(self.client.resume(*arguments, **options))

    def status(self) -> Any:
        return self._wait(self.client.status())

    def models(self) -> Any:
        return self._wait(self.client.models())

    def health(self) -> Any:
        return self._wait(self.client.health())

    def stream(self, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        return self._each(self.client.stream(*arguments, **options))

    def generate_many(self, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        return self._each(self.client.generate_many(*arguments, **options))

    def cancel(self, request_id: str) -> bool:
        async def cancel() -> bool:
            return self.client.cancel(request_id)

        return self._wait(cancel())

    def _each(self, items: AsyncGenerator[_T, None]) -> Generator[_T, None, None]:
        async def following() -> tuple[_T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self._wait(following())) is not None:
                yield item[0]
        finally:
            self._wait(items.aclose())

    def close(self) -> None:
        self._wait(self.client.aclose())

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
