"""The order of many requests: which is sent next, and whose result is yielded next. No IO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve.request import GenerateRequest
from diffuserve_client._results import GenerateResult

__all__ = ["Gathering", "Outcome"]

MOST_CONCURRENT: Final = 1024

#: What became of one request; errors that are no DiffuserveError are bugs, and are raised.
Outcome = GenerateResult | BaseException


class Gathering:
    """`concurrency` requests are under way at most. Where results are yielded in order, those that are done before
    their turn are held, as many again at most; then no more is sent until the one that all wait for is done.

    `requests` is read as it is needed. Raises InvalidArgumentError, TypeError for what is no request.
    """

    def __init__(
        self, requests: Iterable[GenerateRequest | str], *, concurrency: int, in_order: bool, return_errors: bool
    ) -> None:
        if not 1 <= concurrency <= MOST_CONCURRENT:
            raise InvalidArgumentError(
                f"concurrency is {concurrency}, and must be from 1 to {MOST_CONCURRENT}",
                input="concurrency",
                value=concurrency,
                maximum=MOST_CONCURRENT,
            )
        if isinstance(requests, str):
            raise TypeError("requests is one text, whose letters would be a request each; give a list of prompts")
        self._requests = iter(requests)
        self._concurrency = concurrency
        self._in_order = in_order
        self._return_errors = return_errors
        self._sent = 0
        self._under_way = 0
        self._exhausted = False
        self._held: dict[int, Outcome] = {}
        self._yielded = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to send, to wait for or to yield."""
        return self._exhausted and not self._under_way and not self._held

    def to_send(self) -> Iterator[tuple[int, GenerateRequest]]:
        """The requests that may be sent now, each with its place."""
        while (
            not self._exhausted
            and self._under_way < self._concurrency
            and self._sent - self._yielded < 2 * self._concurrency
        ):
            try:
                request = next(self._requests)
            except StopIteration:
                self._exhausted = True
                return
            if not isinstance(request, (GenerateRequest, str)):
                raise TypeError(
                    f"request {self._sent} is {type(request).__name__}, and must be a GenerateRequest or a text"
                )
            index = self._sent
            self._sent += 1
            self._under_way += 1
            yield index, GenerateRequest(prompt=request) if isinstance(request, str) else request

    def done(self, index: int, outcome: Outcome) -> None:
        """A request ended."""
        self._under_way -= 1
        self._held[index] = outcome

    def next_outcome(self) -> GenerateResult | DiffuserveError | None:
        """The outcome whose turn it is; None where that is not there yet.

        Raises an error whose turn it is, unless errors are yielded too.
        """
        index = self._yielded if self._in_order else next(iter(self._held), -1)
        if index not in self._held:
            return None
        outcome = self._held.pop(index)
        self._yielded += 1
        if isinstance(outcome, DiffuserveError):
            outcome.detail["index"] = index
            if self._return_errors:
                return outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
