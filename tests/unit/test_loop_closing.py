"""The loop's end, while a call on no one's behalf is under way."""

from __future__ import annotations

import threading

import pytest

from diffuserve.components import InProcessRunner
from diffuserve.engine import DenoiseLoop, Group, StepCosts, StepPolicy
from diffuserve.engine import loop as loops
from diffuserve.engine.loop import LoopCheckpoint, Trial


class Call:
    """A call that is not answered until it is told to be."""

    def __init__(self) -> None:
        self.began, self.answer, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.began.set()
        self.answer.wait(60)
        self.ended.set()


def no_checkpoint(name: str) -> LoopCheckpoint:
    raise KeyError(name)


def trying(call: Call) -> DenoiseLoop:
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda _: 8)
    loop = DenoiseLoop(InProcessRunner({}), policy, no_checkpoint, trials=[Trial(Group("shapes", 64, 64), 1, call)])
    assert call.began.wait(10)
    return loop


def test_a_trial_that_is_never_answered_does_not_keep_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "_LAST_TRIAL_S", 0.05)
    call = Call()
    trying(call).close()
    assert not call.ended.is_set()
    assert "not answered" in caplog.text
    call.answer.set()


def test_a_trial_that_is_answered_in_time_is_waited_for() -> None:
    call = Call()
    loop = trying(call)
    closing = threading.Thread(target=loop.close)
    closing.start()
    call.answer.set()
    closing.join(10)
    assert call.ended.is_set()
    assert not closing.is_alive()
