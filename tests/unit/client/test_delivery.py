"""What becomes of a request whose tries fail: decided without a server, on a clock of the test's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve_client import (
    CancelledError,
    ComponentFailedError,
    ConnectionFailedError,
    DeadlineError,
    DiffuserveError,
    DrainingError,
    Event,
    GenerateRequest,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueuedEvent,
    QueueFullError,
    Retry,
    SnapshotEvent,
    Timeout,
    UnavailableError,
)
from diffuserve_client._delivery import Attempt, Delivery
from diffuserve_client._endpoints import Endpoints
from unit.client.fake_triton import image, progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Service:
    """What deliveries share: servers a, b, ... and a clock."""

    def __init__(self, *urls: str, retry: Retry | None = None, timeout: float = 60.0) -> None:
        self.clock = Clock()
        self.retry = retry or Retry()
        self.timeout = Timeout(total=timeout)
        self.endpoints = Endpoints(urls or ("a:1",), self.retry, self.clock)

    def delivery(self, request: GenerateRequest | None = None) -> Delivery:
        return Delivery(
            request or GenerateRequest(prompt="a", seed=5),
            request_id="r",
            endpoints=self.endpoints,
            retry=self.retry,
            timeout=self.timeout,
            clock=self.clock,
        )

    def begin(self, delivery: Delivery) -> Attempt:
        """The next try, after its wait."""
        self.clock.now += delivery.wait()
        return delivery.attempt()


def sent(attempt: Attempt) -> GenerateRequest:
    return attempt.exchange._request


def lost() -> ConnectionFailedError:
    return ConnectionFailedError("lost")


def test_the_seed_is_drawn_once_for_all_tries() -> None:
    service = Service()
    delivery = service.delivery(GenerateRequest(prompt="a"))
    seeds = {sent(service.begin(delivery)).seed}
    for _ in range(3):
        delivery.failed(lost())
        seeds.add(sent(service.begin(delivery)).seed)
    assert seeds == {delivery.request.seed}
    assert 0 <= delivery.request.seed < 2**32
    assert service.delivery(GenerateRequest(prompt="a")).request.seed != delivery.request.seed


def test_a_lost_server_is_tried_again_after_growing_pauses_and_then_no_more() -> None:
    service = Service(retry=Retry(retries=4, first=0.5, most=3))
    delivery = service.delivery()
    waits = []
    service.begin(delivery)
    for _ in range(4):
        delivery.failed(lost())
        waits.append(delivery.wait())
        service.clock.now += waits[-1]
        delivery.attempt()
    for wait, pause in zip(waits, (0.5, 1, 2, 3), strict=True):
        assert pause <= wait <= 1.25 * pause
    with pytest.raises(ConnectionFailedError, match=r"^lost \(tried 5 times\)$") as caught:
        delivery.failed(lost())
    assert caught.value.detail["tries"] == 5


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("no"),
        NotFoundError("no"),
        InternalError("no"),
        CancelledError("no"),
        DeadlineError("no"),
    ],
)
def test_what_another_try_would_not_mend_is_raised_at_once(error: DiffuserveError) -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery()
    service.begin(delivery)
    with pytest.raises(type(error), match=r"^no$"):
        delivery.failed(error)


@pytest.mark.parametrize(
    "error", [lost(), QueueFullError("full", eta_ms=1), DrainingError("no"), UnavailableError("no")]
)
def test_with_no_retries_every_failure_is_raised_at_once(error: DiffuserveError) -> None:
    service = Service("a:1", "b:1", retry=Retry(retries=0))
    delivery = service.delivery()
    service.begin(delivery)
    with pytest.raises(type(error)):
        delivery.failed(error)
    assert service.delivery().wait() == 0, "the next request asks at once, though the server is known to have failed"


@pytest.mark.parametrize(
    "error",
    [
        lost(),
        QueueFullError("full", eta_ms=400),
        DrainingError("no"),
        ComponentFailedError("died"),
        DeadlineError("late", unreachable=True),
    ],
)
def test_with_no_retries_too_a_server_that_failed_is_left_alone(error: DiffuserveError) -> None:
    service = Service("a:1", "b:1", retry=Retry(retries=0))
    delivery = service.delivery()
    down = service.begin(delivery).url
    with pytest.raises(type(error)):
        delivery.failed(error)
    assert {service.begin(service.delivery()).url for _ in range(4)} == {"a:1", "b:1"} - {down}
    service.clock.now += 0.5
    assert service.begin(service.delivery()).url == down


def test_tls_that_fails_is_not_tried_again_unless_elsewhere() -> None:
    service = Service()
    delivery = service.delivery()
    service.begin(delivery)
    with pytest.raises(ConnectionFailedError, match=r"^no TLS$"):
        delivery.failed(ConnectionFailedError("no TLS", tls=True))
    service = Service("a:1", "b:1")
    delivery = service.delivery()
    first = service.begin(delivery)
    delivery.failed(ConnectionFailedError("no TLS", tls=True))
    assert service.begin(delivery).url != first.url


def test_a_failed_engine_is_tried_once_more() -> None:
    service = Service()
    delivery = service.delivery()
    service.begin(delivery)
    delivery.failed(ComponentFailedError("died"))
    service.begin(delivery)
    with pytest.raises(ComponentFailedError, match="died"):
        delivery.failed(ComponentFailedError("died"))


def test_a_full_server_is_asked_again_when_it_expects_room_however_often() -> None:
    service = Service(retry=Retry(retries=1), timeout=100)
    delivery = service.delivery()
    for _ in range(20):
        service.begin(delivery)
        delivery.failed(QueueFullError("full", eta_ms=3000))
        assert 3 <= delivery.wait() <= 3.75
    service.clock.now += 39
    with pytest.raises(QueueFullError, match="full"):
        service.begin(delivery)


def test_a_full_server_is_waited_for_however_often_another_is_lost() -> None:
    service = Service("a:1", "b:1", retry=Retry(retries=1), timeout=1000)
    delivery = service.delivery()
    began = service.clock.now
    full = service.begin(delivery).url
    delivery.failed(QueueFullError("full", eta_ms=120_000))
    while service.begin(delivery).url != full:
        delivery.failed(lost())
    assert service.clock.now - began >= 120
    with pytest.raises(ConnectionFailedError, match=r"lost \(tried \d+ times\)"):
        delivery.failed(lost())  # that one too, and nobody is left to be waited for


@pytest.mark.parametrize("told", [{}, {"eta_ms": "soon"}, {"eta_ms": None}, {"eta_ms": 0}])
def test_a_full_server_that_says_nothing_useful_is_asked_again_soon(told: dict[str, Any]) -> None:
    service = Service()
    delivery = service.delivery()
    service.begin(delivery)
    delivery.failed(QueueFullError("full", **told))
    assert 0.1 <= delivery.wait() <= 0.625


def test_while_one_server_is_full_another_is_asked_at_once() -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery()
    first = service.begin(delivery)
    delivery.failed(QueueFullError("full", eta_ms=9000))
    assert delivery.wait() == 0
    assert {first.url, delivery.attempt().url} == {"a:1", "b:1"}


def test_a_full_server_stays_full_while_it_tells_of_others_steps() -> None:
    service = Service("a:1", "b:1")
    busy = [service.delivery(GenerateRequest(prompt="a", progress_every=1)) for _ in range(2)]
    for one in busy:
        service.begin(one)
    delivery = service.delivery()
    for _ in range(2):
        service.begin(delivery)
        delivery.failed(QueueFullError("full", eta_ms=3000))
    for one in busy:
        one.take(progress(1, 20))
    assert delivery.wait() >= 3
    busy[0].take(image())
    assert delivery.wait() == 0, "that one's place is free"


def test_a_wait_that_would_outlast_the_timeout_is_not_begun() -> None:
    service = Service(timeout=5)
    delivery = service.delivery()
    service.begin(delivery)
    delivery.failed(QueueFullError("full", eta_ms=6000))
    with pytest.raises(QueueFullError, match="full"):
        delivery.wait()


def test_each_image_is_delivered_once_and_a_later_try_asks_only_for_the_missing() -> None:
    service = Service()
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=6, progress_every=1))
    service.begin(delivery)
    assert [delivery.take(image(index, seed=5)) for index in (0, 3, 5)] != [None] * 3
    delivery.failed(lost())
    again = sent(service.begin(delivery))
    assert (again.seed, again.num_images) == (6, 4), "images 1 to 4"
    assert delivery.take(progress(1, 4)) is not None
    assert delivery.take(replace(progress(1, 4), index=2)) is None, "of image 3, which is there"
    delivered = [delivery.take(image(index, seed=6)) for index in range(4)]
    assert [(event.index, event.seed) if event else None for event in delivered] == [(1, 6), (2, 7), None, (4, 9)]
    delivery.ended(handed_over=False)
    assert delivery.is_done


@pytest.mark.parametrize("error", [lost(), DeadlineError("late"), UnavailableError("died")])
@pytest.mark.parametrize("retries", [0, 4])
def test_a_request_that_is_lost_after_its_last_image_is_done(error: DiffuserveError, retries: int) -> None:
    service = Service(retry=Retry(retries=retries))
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=2))
    service.begin(delivery)
    delivery.take(image(0))
    delivery.take(image(1))
    delivery.failed(error)
    assert delivery.is_done


def test_a_request_goes_on_elsewhere_from_a_snapshot() -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=3, priority=7))
    first = service.begin(delivery)
    delivery.take(image(1))
    event = delivery.take(Event(kind="snapshot", data=b"half done", info={}))
    assert isinstance(event, SnapshotEvent)
    delivery.ended(handed_over=True)
    assert not delivery.is_done
    assert delivery.wait() == 0
    second = delivery.attempt()
    assert second.url != first.url
    assert sent(second) == GenerateRequest(prompt="", resume=b"half done", priority=7)
    delivery.failed(lost())
    assert sent(service.begin(delivery)).resume == b"half done", "which is as good as before"
    assert delivery.take(image(1)) is None
    assert delivery.take(image(2)) is not None


def test_a_snapshot_that_the_other_refuses_is_let_go() -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=3))
    service.begin(delivery)
    delivery.take(image(0))
    delivery.take(Event(kind="snapshot", data=b"half done", info={}))
    delivery.ended(handed_over=True)
    service.begin(delivery)
    delivery.failed(InvalidArgumentError("signed with another key"))
    again = sent(service.begin(delivery))
    assert (again.prompt, again.resume, again.seed, again.num_images) == ("a", b"", 6, 2)


def test_a_snapshot_that_nobody_took_is_the_callers() -> None:
    service = Service(retry=Retry(retries=1))
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=3))
    service.begin(delivery)
    delivery.take(Event(kind="snapshot", data=b"half done", info={}))
    delivery.ended(handed_over=True)
    service.begin(delivery)
    with pytest.raises(ConnectionFailedError) as caught:
        delivery.failed(lost())
    assert caught.value.detail["snapshot"] == b"half done"


def test_a_snapshot_within_a_later_part_keeps_its_place() -> None:
    service = Service()
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, num_images=4))
    service.begin(delivery)
    delivery.take(image(0))
    delivery.take(image(1))
    delivery.failed(lost())
    service.begin(delivery)
    delivery.take(Event(kind="snapshot", data=b"half done", info={}))
    delivery.ended(handed_over=True)
    service.begin(delivery)
    events = [delivery.take(image(index)) for index in (0, 1)]
    assert [event.index for event in events if event] == [2, 3]


def test_the_callers_own_snapshot_is_not_let_go() -> None:
    service = Service()
    delivery = service.delivery(GenerateRequest(prompt="", resume=b"theirs"))
    assert sent(service.begin(delivery)).resume == b"theirs"
    with pytest.raises(InvalidArgumentError, match="another key"):
        delivery.failed(InvalidArgumentError("signed with another key"))


def test_without_retries_a_snapshot_is_the_callers() -> None:
    service = Service(retry=Retry(retries=0))
    delivery = service.delivery()
    service.begin(delivery)
    delivery.take(Event(kind="snapshot", data=b"half done", info={}))
    with pytest.raises(DrainingError, match=r"the server at a:1 was shut down") as caught:
        delivery.ended(handed_over=True)
    assert caught.value.detail["snapshot"] == b"half done"


def test_the_time_is_that_of_all_tries() -> None:
    service = Service(timeout=10)
    delivery = service.delivery()
    service.clock.now += 50  # a stream that is not read yet
    service.begin(delivery)
    service.clock.now += 9.8
    assert delivery.left == pytest.approx(0.2)
    delivery.failed(lost())
    with pytest.raises(ConnectionFailedError, match="lost"):
        delivery.wait()
    late = service.delivery()
    late.wait()
    service.clock.now += 11
    with pytest.raises(DeadlineError, match="not sent within 10 s"):
        late.attempt()


def test_a_requests_deadline_is_that_of_all_tries() -> None:
    service = Service(retry=Retry(first=2, most=2))
    delivery = service.delivery(GenerateRequest(prompt="a", seed=5, deadline_ms=5000))
    assert sent(service.begin(delivery)).deadline_ms == 5000
    delivery.failed(lost())
    began = service.clock.now
    assert sent(service.begin(delivery)).deadline_ms == pytest.approx(5000 - 1000 * (service.clock.now - began), abs=1)
    service.clock.now = began + 4
    delivery.failed(lost())
    with pytest.raises(ConnectionFailedError, match=r"lost \(tried 2 times\)"):
        delivery.wait()


def test_progress_that_was_only_asked_for_the_load_is_not_delivered() -> None:
    service = Service("a:1", "b:1")
    queued = Event(kind="queued", info={"eta_ms": 1500, "images": 9})
    delivery = service.delivery()
    service.begin(delivery)
    assert delivery.take(queued) is None
    assert delivery.take(progress(150, 150)) is None
    curious = service.delivery(GenerateRequest(prompt="a", progress_every=1))
    service.begin(curious)
    event = curious.take(queued)
    assert isinstance(event, QueuedEvent)
    assert event.eta_s == 1.5


def test_requests_go_where_least_is_to_do() -> None:
    service = Service("a:1", "b:1", "c:1")
    first = [service.begin(service.delivery()).url for _ in range(3)]
    assert sorted(first) == ["a:1", "b:1", "c:1"], "one each"
    service = Service("a:1", "b:1")
    busy, idle = service.delivery(), service.delivery(GenerateRequest(prompt="a", num_images=4))
    at_busy = service.begin(busy).url
    busy.take(Event(kind="queued", info={"eta_ms": 1, "images": 41}))
    assert service.begin(idle).url != at_busy
    for _ in range(5):
        assert service.begin(service.delivery()).url != at_busy, "others have 40 images there"
    service.clock.now += 30
    assert service.begin(service.delivery()).url == at_busy, "that was long ago"


def test_a_server_that_is_down_is_left_alone_until_it_may_be_back() -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery()
    down = service.begin(delivery).url
    delivery.failed(lost())
    assert {service.begin(service.delivery()).url for _ in range(4)} == {"a:1", "b:1"} - {down}
    service.clock.now += 0.5
    assert service.begin(service.delivery()).url == down


def test_one_request_finds_out_whether_a_server_is_back() -> None:
    service = Service("a:1", "b:1")
    delivery = service.delivery()
    down = service.begin(delivery).url
    delivery.failed(lost())
    for _ in range(8):
        assert service.begin(service.delivery()).url != down
    service.clock.now += 0.5
    first = service.delivery()
    assert service.begin(first).url == down, "which has nothing to do"
    for _ in range(8):
        assert service.begin(service.delivery()).url != down, "the first has no answer yet"
    first.take(progress(1, 20))
    assert service.begin(service.delivery()).url == down


def test_requests_that_were_lost_together_are_one_failure_of_the_server() -> None:
    service = Service(retry=Retry(first=0.5))
    many = [service.delivery() for _ in range(16)]
    for delivery in many:
        service.begin(delivery)
    for delivery in many:
        delivery.failed(lost())
    assert many[0].wait() <= 0.625
    service.clock.now += 0.5
    fresh = service.delivery()
    assert fresh.wait() == 0
    service.begin(fresh)
    fresh.failed(lost())
    assert 1 <= many[0].wait() <= 1.25
    service.clock.now += 1
    service.begin(fresh)
    fresh.take(image())
    assert many[0].wait() == 0


@given(
    st.lists(st.sampled_from(["lost", "full", "draining", "image", "snapshot", "refused"]), max_size=60),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_no_image_is_lost_or_doubled_whatever_fails(happenings: list[str], count: int, servers: int) -> None:
    service = Service(*(f"{name}:1" for name in "abc"[:servers]), retry=Retry(retries=1000), timeout=1e9)
    delivery = service.delivery(GenerateRequest(prompt="a", seed=100, num_images=count))
    delivered: list[tuple[int, int]] = []
    left_in_snapshot: list[int] = []
    while not delivery.is_done:
        request = sent(service.begin(delivery))
        # What the server still makes of it, and where that begins: a snapshot holds what was left.
        if request.resume:
            todo = list(left_in_snapshot)
        else:
            todo, base = list(range(request.num_images)), request.seed
        while True:
            happening = happenings.pop() if happenings else "image"
            if happening == "image" and todo:
                index = todo.pop(0)
                event = delivery.take(image(index, seed=base))
                if event is not None:
                    delivered.append((event.index, event.seed))
                if not todo and happenings and happenings[-1] == "lost":
                    continue  # before the word that this was the last
                if not todo:
                    delivery.ended(handed_over=False)
                    break
            elif happening == "snapshot" and todo:
                left_in_snapshot = list(todo)
                delivery.take(Event(kind="snapshot", data=b"left", info={}))
                delivery.ended(handed_over=True)
                break
            elif happening == "refused" and request.resume:
                delivery.failed(InvalidArgumentError("another key"))
                break
            elif happening in ("lost", "full", "draining"):
                kinds = {"lost": lost(), "full": QueueFullError("full", eta_ms=5), "draining": DrainingError("bye")}
                delivery.failed(kinds[happening])
                break
    assert sorted(delivered) == [(index, 100 + index) for index in range(count)]
    assert service.endpoints.take(0).in_flight == 0
