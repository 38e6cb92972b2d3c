"""Requests with much to read: off the caller's thread, within the limit, and each with one answer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from diffuserve import admission, request
from diffuserve.admission import Admission
from diffuserve.errors import CancelledError, InvalidArgumentError, QueueFullError
from diffuserve.heartbeats import Heartbeats
from diffuserve.request import Event, GenerateRequest
from unit.fakes import Recorder

PLAIN = GenerateRequest(prompt="a ring")
IMAGE = Event(kind="image", info={})


class Service:
    """Keeps the replies that it is given, and fails with `error` where there is one."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.threads: list[threading.Thread] = []
        self.error: Exception | None = None
        self.hold: Callable[[], object] = lambda: None

    def submit(self, request: GenerateRequest, reply: Any, *, request_id: str, trace: object | None) -> None:
        self.threads.append(threading.current_thread())
        self.hold()
        if self.error:
            raise self.error
        self.replies.append(reply)


def large(size: int = 100_000, priority: int = 0) -> GenerateRequest:
    return GenerateRequest(prompt="a ring", init_image=bytes(size), priority=priority)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def admit(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[GenerateRequest], Recorder]]:
    monkeypatch.setattr(admission, "MAX_GIVEN_BYTES", 250_000)
    heartbeats = Heartbeats()
    one = Admission(service.submit, lambda reply, _, error: reply.fail(error), heartbeats)  # type: ignore[arg-type]

    def admit(request: GenerateRequest) -> Recorder:
        reply = Recorder()
        one.submit(request, reply, request_id="1", trace=None)
        return reply

    admit.close = one.close  # type: ignore[attr-defined]
    yield admit
    one.close()
    heartbeats.close()


def taken(service: Service, count: int) -> list[Any]:
    for _ in range(10_000):
        if len(service.replies) == count:
            return service.replies
        threading.Event().wait(0.001)
    raise AssertionError(f"{len(service.replies)} of {count} were submitted")


def test_a_request_with_nothing_to_read_is_submitted_at_once_and_its_error_raised(service: Service, admit: Any) -> None:
    admit(PLAIN)
    assert service.threads == [threading.current_thread()]
    service.error = InvalidArgumentError("it is so")
    with pytest.raises(InvalidArgumentError):
        admit(PLAIN)


@pytest.mark.parametrize("size", [1, 100_000])
def test_one_with_a_picture_is_read_elsewhere_and_its_error_sent(service: Service, admit: Any, size: int) -> None:
    service.error = InvalidArgumentError("init_image is no picture")
    reply = admit(large(size)).wait()
    assert isinstance(reply.error, InvalidArgumentError)
    assert threading.current_thread() not in service.threads
    service.error = ZeroDivisionError("a bug")
    assert isinstance(admit(large(size)).wait().error, ZeroDivisionError)


def test_what_is_read_does_not_hold_up_requests_with_nothing_to_read(service: Service, admit: Any) -> None:
    release = threading.Event()
    service.hold = lambda: None if threading.current_thread() is main else release.wait(10)
    main = threading.current_thread()
    admit(large())
    admit(PLAIN)
    assert len(service.replies) == 1
    release.set()
    taken(service, 2)


def test_one_that_waits_to_be_read_gives_signs_of_life_until_it_is(
    service: Service, admit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "MIN_HEARTBEAT_MS", 1)
    go_on, beaten = threading.Event(), threading.Semaphore(0)
    service.hold = go_on.wait
    told = list[tuple[str, bool]]()

    def send(_: Recorder, event: Event, *, final: bool) -> None:
        told.append((event.kind, final))
        beaten.release()

    monkeypatch.setattr(Recorder, "send", send)
    for _ in range(3):
        admit(replace(large(70_000), heartbeat_ms=5))
    heard = [beaten.acquire(timeout=20) for _ in range(9)]
    go_on.set()
    assert all(heard)
    assert set(told) == {("heartbeat", False)}
    held = taken(service, 3)
    for one in held:
        one.send(IMAGE, final=True)
        assert one.beat(time.monotonic() + 60) == math.inf


def test_requests_hold_no_more_bytes_together_than_the_limit_until_they_end(service: Service, admit: Any) -> None:
    for _ in range(3):
        service.replies.clear()
        admit(large())
        admit(large())
        first, second = taken(service, 2)
        with pytest.raises(QueueFullError, match="have 200000 bytes, this one's 100000, and together at most 250000"):
            admit(large())
        admit(PLAIN)
        first.send(IMAGE, final=False)
        with pytest.raises(QueueFullError):
            admit(large())
        first.send(IMAGE, final=True)
        second.fail(CancelledError("the client cancelled"))
        service.error = InvalidArgumentError("refused")
        admit(large()).wait()
        service.error = None


def test_bytes_are_given_back_where_the_last_answer_cannot_be_sent(service: Service, admit: Any) -> None:
    admit(large(250_000))
    (reply,) = taken(service, 1)
    reply._reply.ended.set()  # so that the recorder refuses what comes
    with pytest.raises(AssertionError):
        reply.fail(CancelledError("x"))
    service.replies.clear()
    admit(large(250_000))
    taken(service, 1)


def test_what_is_too_large_alone_will_never_fit(admit: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match="have 250001 bytes, and at most 250000 are taken; make them smaller"
    ):
        admit(large(250_001))


def test_nothing_is_taken_once_it_is_closed(service: Service, admit: Any) -> None:
    admit.close()
    with pytest.raises(CancelledError, match="shutting down"):
        admit(large())
    with pytest.raises(CancelledError, match="shutting down"):
        admit(large(200_000))
