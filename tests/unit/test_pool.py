"""The pool's arithmetic: guidance as diffusers does it, padding that changes nothing, slots that are used again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffuserve.engine import HIDDEN_STATES, Group, LatentPool, Track
from diffuserve.sampling import TrajectoryCompiler
from unit.fakes import SCHEDULER

SHAPE = (4, 6, 8)
COMPILER = TrajectoryCompiler(SCHEDULER)


def make_track(seed: int, rows: int = 2, steps: int = 3, **values: Any) -> Track:
    generator = torch.Generator().manual_seed(seed)
    return Track(
        group=Group("any", 48, 64),
        trajectory=COMPILER("ddim", steps),
        guidance_scale=values.pop("guidance_scale", 5.0 if rows == 2 else 1.0),
        latents=torch.randn(SHAPE, generator=generator),
        conditioning={HIDDEN_STATES: torch.randn((rows, values.pop("tokens", 3), 2), generator=generator)},
        generator=generator,
        **values,
    )


def denoise(sample: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Any function of a row's own inputs that, as attention, does not see whether all of its tokens come twice."""
    hidden = conditioning[HIDDEN_STATES]
    return sample.sin() * hidden.mean(dim=(1, 2))[:, None, None, None] + timestep[:, None, None, None] / 1000


def run(pool: LatentPool, tracks: list[Track], padding: int = 0) -> list[torch.Tensor]:
    for track in tracks:
        pool.join(track)
    while not tracks[0].is_done:
        pool.step(tracks, denoise, sum(track.rows for track in tracks) + padding)
    return [pool.leave(track)[0] for track in tracks]


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guidance_and_its_rescaling_are_diffusers(rescale: float) -> None:
    pool, track = LatentPool(), make_track(1, guidance_scale=7.5, guidance_rescale=rescale, steps=1)
    latents, hidden, trajectory = track.latents[None], track.conditioning[HIDDEN_STATES], track.trajectory
    told = torch.tensor([trajectory.timestep[0]]).float()
    conditional, unconditional = (denoise(latents, told, {HIDDEN_STATES: hidden[i : i + 1]}) for i in range(2))
    output = unconditional + 7.5 * (conditional - unconditional)
    if rescale:
        output = rescale_noise_cfg(output, conditional, rescale)
    expected = trajectory.a[0] * latents + trajectory.b[0, 0] * (trajectory.p[0] * latents + trajectory.q[0] * output)
    (actual,) = run(pool, [track])
    assert torch.allclose(actual, expected[0].float(), rtol=1e-5, atol=1e-5)


def test_padding_and_company_change_nothing() -> None:
    alone = [run(LatentPool(), [make_track(seed, rows)])[0] for seed, rows in ((1, 2), (2, 1), (3, 2))]
    together = run(LatentPool(), [make_track(seed, rows) for seed, rows in ((1, 2), (2, 1), (3, 2))])
    padded = run(LatentPool(), [make_track(seed, rows) for seed, rows in ((1, 2), (2, 1), (3, 2))], padding=3)
    for one, other, third in zip(alone, together, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert torch.equal(other, third)


def test_the_call_has_the_rows_that_were_asked_for() -> None:
    pool, track, seen = LatentPool(), make_track(1), list[int]()
    pool.join(track)

    def counted(sample: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(sample))
        assert len(conditioning[HIDDEN_STATES]) == len(sample)
        return denoise(sample, timestep, conditioning)

    pool.step([track], counted, 6)
    pool.step([track], counted, 0)
    assert seen == [6, 2]


def test_prompts_of_different_lengths_share_a_call() -> None:
    def tracks() -> list[Track]:
        return [make_track(seed, tokens=tokens) for seed, tokens in ((1, 3), (2, 6), (3, 9))]

    together = run(LatentPool(), tracks())
    for track, expected in zip(tracks(), together, strict=True):
        (alone,) = run(LatentPool(), [track])
        assert torch.allclose(alone, expected, atol=1e-5)


def test_slots_are_used_again_and_start_clean() -> None:
    pool = LatentPool()
    (first,) = run(pool, [make_track(1, steps=5)])
    for round_ in range(50):
        run(pool, [make_track(round_ + 2), make_track(round_ + 3, rows=1)])
    assert pool._capacity == 8
    assert pool.is_empty
    (again,) = run(pool, [make_track(1, steps=5)])
    assert torch.equal(first, again)


def test_more_images_than_slots_keep_their_latents() -> None:
    pool, tracks = LatentPool(), [make_track(seed, rows=1 + seed % 2) for seed in range(20)]
    expected = [run(LatentPool(), [make_track(seed, rows=1 + seed % 2)])[0] for seed in range(20)]
    for one, other in zip(run(pool, tracks), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert pool._capacity == 32
