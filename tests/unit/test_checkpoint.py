"""A request with its names resolved: what is reported makes the same picture, and what cannot be is refused early."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from diffuserve.checkpoint import Checkpoint
from diffuserve.components import InProcessRunner
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.images import image_from_pixels
from diffuserve.manifest import Conditioning, Range
from diffuserve.request import GenerateRequest
from diffuserve.sampling.matrix import REFERENCE
from diffuserve.sampling.names import SAMPLER_NAMES
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


def test_it_tells_what_it_takes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    told = checkpoint.told(0.0)
    side = {"minimum": 32, "default": 64, "maximum": 192, "step": 16}
    assert (told["family"], told["prediction_type"]) == ("sd15", "epsilon")
    assert told["limits"] == {
        "width": side,
        "height": side,
        "steps": 150,
        "num_images": 16,
        "rows": 64,
        "clip_skip": 12,
        "init_image": True,
        "mask_image": True,
        "needs_mask": False,
        "control_image": False,
        "lora_rank": 0,
    }
    assert told["defaults"] == {"width": 64, "height": 64, "steps": 20, "guidance_scale": 7.5, "sampler": "pndm"}
    assert told["samplers"] == SAMPLER_NAMES
    assert (told["loras"], told["loras_not_looked_at"]) == ((), 0)
    conditioning = Conditioning(control=True, sample=("latents", "mask", "masked_latents"), clip_skip=1)
    other = write_deployment(tmp_path / "other", "fake", conditioning=conditioning, steps=4)
    told = Checkpoint(other, "fake", FakeModels().runner()).told(0.0)
    assert {"needs_mask": True, "control_image": True, "clip_skip": 1}.items() <= told["limits"].items()


def test_it_tells_only_of_samplers_that_its_config_allows(tmp_path: Path) -> None:
    config = {**REFERENCE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    deployment = write_deployment(tmp_path, "fake", scheduler={**config, "_class_name": "DDIMScheduler"})
    checkpoint = Checkpoint(deployment, "fake", FakeModels().runner())
    told = checkpoint.told(0.0)
    assert told["prediction_type"] == "v_prediction"
    assert told["samplers"]
    assert set(told["samplers"]) < set(SAMPLER_NAMES)
    for name in SAMPLER_NAMES:
        if name in told["samplers"]:
            checkpoint.trajectory(checkpoint.resolve(ask(sampler=name)))
        else:
            with pytest.raises(UnsupportedError):
                checkpoint.trajectory(checkpoint.resolve(ask(sampler=name)))


def test_large_pictures_go_through_the_autoencoder_in_tiles(tmp_path: Path) -> None:
    """Both ways, in as few calls as its rows allow; these fakes need no surroundings, so that nothing else changes."""
    deployment = write_deployment(tmp_path, "fake", max_rows=5, vae_size=Range(32, 64, 64, 16))
    models, calls = FakeModels(), list[tuple[int, ...]]()

    def encode(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(tuple(inputs["pixels"].shape))
        colours = functional.avg_pool2d(inputs["pixels"], 8)
        return {"moments": torch.cat([colours, colours[:, :1], colours * 0, colours[:, :1] * 0], dim=1)}

    def decode(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(tuple(inputs["latents"].shape))
        return models.decode(inputs)

    runner = InProcessRunner({"vae_encoder": encode, "vae_decoder": decode})
    checkpoint = Checkpoint(deployment, "fake", runner)
    latents = torch.randn(4, 24, 16)
    expected = models.decode({"latents": latents[None]})["pixels"][0]
    assert torch.allclose(checkpoint.decode(latents), expected, atol=1e-6)
    # 4 tiles down and 3 across, 8 latents a side.
    assert calls == [(5, 4, 8, 8), (5, 4, 8, 8), (2, 4, 8, 8)]
    calls.clear()
    file = BytesIO()
    image_from_pixels(expected).save(file, "PNG")
    given = checkpoint.encode(checkpoint.resolve(ask(init_image=file.getvalue()))).picture
    assert given is not None
    mean, deviation = given
    assert torch.allclose(mean[:3], latents[:3].tanh(), atol=0.01)
    assert not deviation.any()
    assert calls == [(5, 3, 64, 64), (5, 3, 64, 64), (2, 3, 64, 64)]
