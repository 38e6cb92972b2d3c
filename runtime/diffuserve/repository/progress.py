"""What a transfer tells of itself while it runs, and how many things it does at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from diffuserve.errors import CancelledError

__all__ = ["Progress"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Progress:
    """Listens, and by itself does nothing: for `began` and `advanced` to be overridden. Called from several threads."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def began(self, label: str, total: int) -> None:
        """Something with a label begins, of so many bytes."""

    def advanced(self, label: str, count: int) -> None:
        """So many bytes of it more are done; fewer than none where something is done anew."""

    def advance(self, label: str, count: int) -> None:
        """Raises CancelledError once it was stopped: whatever moves bytes ends there."""
        if self._stopped.is_set():
            raise CancelledError("interrupted; run this again: it goes on where it was")
        self.advanced(label, count)

    def in_parallel(self, act: Callable[[_Item], _Result], items: Iterable[_Item], jobs: int) -> list[_Result]:
        """`act` of each item, at most `jobs` at a time; the results in order.

        The first that raises keeps those from beginning that have not begun; Ctrl-C also ends what moves bytes.
        """
        with ThreadPoolExecutor(jobs, "transfer") as pool:
            futures = [pool.submit(act, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]
