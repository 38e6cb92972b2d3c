"""Engines on torch tensors, with a stand-in for TensorRT on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffuserve.engine_session import EngineSession
from diffuserve.errors import ComponentFailedError, InvalidArgumentError
from unit import fake_tensorrt

CPU = torch.device("cpu")
PROFILES = (([4, 2], [4, 2]), ([1, 1], [8, 2]), ([1, 1], [2, 8]))


@pytest.fixture
def session() -> EngineSession:
    return EngineSession(fake_tensorrt, fake_tensorrt.plan(*PROFILES), CPU)


def inputs(rows: int, width: int) -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(rows, width), "timestep": torch.zeros(rows)}


@pytest.mark.parametrize(("rows", "width"), [(4, 2), (8, 2), (1, 1), (2, 8), (1, 5)])
def test_a_call_runs_in_a_profile_that_takes_it(session: EngineSession, rows: int, width: int) -> None:
    feed = inputs(rows, width)
    outputs = session.run(feed)
    assert list(outputs) == ["model_output"]
    torch.testing.assert_close(outputs["model_output"], feed["sample"] * 2)


def test_each_profile_has_one_context_and_all_share_their_memory(session: EngineSession) -> None:
    engine: Any = session._engine
    for rows, width in ((4, 2), (4, 2), (2, 8), (1, 1), (4, 2)):
        session.run(inputs(rows, width))
    assert engine.made == 3
    assert sorted(session._contexts) == [0, 1, 2]
    assert session._memory.numel() == 3 * 512


def test_a_tensor_of_another_memory_layout_is_taken(session: EngineSession) -> None:
    sample = torch.randn(2, 4).T
    outputs = session.run({"sample": sample, "timestep": torch.zeros(4)})
    torch.testing.assert_close(outputs["model_output"], sample * 2)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        (inputs(9, 2), r"no profile of the engine takes sample \[9, 2\], timestep \[9\]"),
        (inputs(3, 8), "no profile of the engine takes"),
        ({**inputs(4, 2), "sample": torch.randn(4, 2, 1)}, "no profile of the engine takes"),
        ({"sample": torch.randn(4, 2)}, "the input timestep is missing"),
        ({**inputs(4, 2), "sample": torch.randn(4, 2).half()}, "sample is torch.float16, and torch.float32 is taken"),
    ],
)
def test_what_no_profile_takes_is_refused(session: EngineSession, feed: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        session.run(feed)


def test_an_engine_that_cannot_be_opened_or_run_is_an_error(session: EngineSession) -> None:
    with pytest.raises(ComponentFailedError, match=r"tensorrt_rtx 1\.7\.1\.116 cannot open the engine"):
        EngineSession(fake_tensorrt, b"damaged", CPU)
    with pytest.raises(ComponentFailedError, match="the engine did not run"):
        session.run(inputs(1, 7))
