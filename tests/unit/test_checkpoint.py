"""A request with its names resolved: what is reported makes the same picture, and what cannot be is refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.request import GenerateRequest
from unit.fakes import FakeModels, write_deployment


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(write_deployment(tmp_path, "fake"), "fake", FakeModels().runner())


def ask(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red circle", "seed": 1, "steps": 5, **values})


@pytest.mark.parametrize(
    ("asked", "sampler", "schedule"),
    [
        ({}, "pndm", None),
        ({"sampler": "DPM++ 2M Karras"}, "dpmpp_2m", "karras"),
        ({"sampler": "Heun", "sigma_schedule": "Beta"}, "heun", "beta"),
        ({"sampler": "EulerDiscreteScheduler"}, "euler", None),
        ({"sampler": "DDIM", "eta": 0.5}, "ddim", None),
        ({"sigma_schedule": "simple"}, "pndm", "sgm_uniform"),
    ],
)
def test_what_is_reported_makes_the_same_picture(
    checkpoint: Checkpoint, asked: dict[str, Any], sampler: str, schedule: str | None
) -> None:
    resolved = checkpoint.resolve(ask(**asked))
    assert (resolved.sampler, resolved.sigma_schedule, resolved.eta) == (sampler, schedule, asked.get("eta", 0.0))
    reported: dict[str, Any] = resolved.parameters(0)
    again = checkpoint.resolve(
        GenerateRequest(**{name: reported[name] for name in GenerateRequest(prompt="").parameters()})
    )
    assert again.parameters(0) == reported
    assert checkpoint.trajectory(again) is checkpoint.trajectory(resolved)


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        ({"sampler": "eulr"}, InvalidArgumentError, "must be one of ddim"),
        ({"sigma_schedule": "cosine"}, InvalidArgumentError, "must be one of normal"),
        ({"sampler": "LMS Karras", "sigma_schedule": "beta"}, InvalidArgumentError, "give one of them"),
        ({"sampler": "DPM++ SDE"}, UnsupportedError, "use dpmpp_2m_sde"),
        ({"sampler": "ddim", "sigma_schedule": "karras"}, UnsupportedError, "takes no use_karras_sigmas"),
        ({"sampler": "euler", "eta": 0.1}, UnsupportedError, "euler takes none"),
        ({"eta": 1.0}, UnsupportedError, "pndm takes none"),
    ],
)
def test_what_cannot_be_is_refused_at_admission(
    checkpoint: Checkpoint, asked: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        checkpoint.resolve(ask(**asked))


def test_too_many_steps_for_a_distilled_sampler_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UnsupportedError, match="at most 50"):
        checkpoint.trajectory(checkpoint.resolve(ask(sampler="lcm", steps=51)))
