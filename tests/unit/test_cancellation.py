"""The thread that asks whether clients cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from diffuserve.cancellation import CancelWatch


class Asked:
    """Says no a number of times, and then that there is nothing more to ask; counts."""

    def __init__(self, noes: int) -> None:
        self.noes, self.count = noes, 0
        self.ended, self.asked_often = threading.Event(), threading.Event()

    def ask(self) -> bool:
        self.count += 1
        if self.count >= 5:
            self.asked_often.set()
        if self.count > self.noes:
            self.ended.set()
            return False
        return True


class Broken(Asked):
    def ask(self) -> bool:
        super().ask()
        raise RuntimeError("the sender is gone")


@pytest.fixture
def watch() -> Iterator[CancelWatch]:
    watch = CancelWatch()
    yield watch
    watch.close()


def test_each_is_asked_until_it_ends(watch: CancelWatch) -> None:
    short, long = Asked(2), Asked(10_000)
    watch.add(short)
    watch.add(long)
    assert short.ended.wait(10)
    assert long.asked_often.wait(10)
    assert short.count == 3


def test_one_that_raises_is_let_go_and_the_others_are_asked_on(
    watch: CancelWatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Broken(10_000), Asked(10_000)
    watch.add(broken)
    watch.add(other)
    assert other.asked_often.wait(10)
    assert broken.count == 1
    assert "could not be asked" in caplog.text


def test_who_is_discarded_is_asked_no_more(watch: CancelWatch) -> None:
    gone, other = Asked(10_000), Asked(10_000)
    watch.add(gone)
    assert gone.asked_often.wait(10)
    watch.discard(gone)
    watch.discard(gone)
    watch.add(other)
    assert other.asked_often.wait(10)
    count = gone.count
    other.asked_often.clear()
    assert other.asked_often.wait(10)
    assert gone.count == count


def test_it_ends_with_requests_that_are_still_watched() -> None:
    watch = CancelWatch()
    watch.add(Asked(10_000))
    watch.close()
    watch.close()
