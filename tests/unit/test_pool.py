"""The pool's arithmetic: guidance as diffusers does it, padding that changes nothing, slots that are used again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffuserve.engine import HIDDEN_STATES, Group, LatentPool, Masked, Track
from diffuserve.lora.packing import Adapter
from diffuserve.lora.stack import AdapterStack
from diffuserve.sampling import SAMPLERS, TrajectoryCompiler, make_scheduler
from diffuserve.sampling.matrix import REFERENCE
from unit.fakes import component
from unit.lora.files import LAYOUTS, adapted

SHAPE = (4, 6, 8)
COMPILER = TrajectoryCompiler(REFERENCE)


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


def taken(pool: LatentPool, tracks: list[Track]) -> list[torch.Tensor]:
    """The tracks' latents, after which they have left."""
    latents = [pool.state(track)[0] for track in tracks]
    for track in tracks:
        pool.leave(track)
    return latents


def run(pool: LatentPool, tracks: list[Track], padding: int = 0) -> list[torch.Tensor]:
    for track in tracks:
        pool.join(track)
    while not tracks[0].is_done:
        pool.step(tracks, denoise, sum(track.rows for track in tracks) + padding)
    return taken(pool, tracks)


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


def make_masked(seed: int, is_told: bool = False) -> Masked:
    generator = torch.Generator().manual_seed(1000 + seed)
    mask = torch.rand((1, *SHAPE[1:]), generator=generator) < 0.5
    latents, noise = torch.randn((2, *SHAPE), generator=generator)
    return Masked(mask, latents, None if is_told else noise)


def test_images_with_masks_share_calls_with_others_which_do_not_notice() -> None:
    def tracks(*with_mask: int) -> list[Track]:
        return [make_track(seed, masked=make_masked(seed) if seed in with_mask else None) for seed in range(4)]

    plain, mixed = run(LatentPool(), tracks()), run(LatentPool(), tracks(1, 3))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[2], mixed[2])
    for seed in (1, 3):
        masked = make_masked(seed)
        (alone,) = run(LatentPool(), [make_track(seed, masked=masked)])
        assert torch.allclose(alone, mixed[seed], atol=1e-6)
        kept = ~masked.mask.expand(SHAPE)
        assert torch.equal(mixed[seed][kept], masked.latents[kept]), "after the last evaluation it is as it was given"
        assert not torch.isclose(mixed[seed], masked.latents)[~kept].any()


def test_what_a_mask_keeps_is_as_noisy_as_the_next_call_wants_it() -> None:
    pool, masked, seen = LatentPool(), make_masked(1), list[torch.Tensor]()
    track = make_track(1, rows=1, masked=masked)
    pool.join(track)

    def watched(sample: torch.Tensor, timestep: torch.Tensor, told: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(sample[0])
        return denoise(sample, timestep, told)

    for _ in range(3):
        pool.step([track], watched)
    scheduler = make_scheduler(REFERENCE, SAMPLERS["ddim"])
    scheduler.set_timesteps(3)
    kept = ~masked.mask.expand(SHAPE)
    for sample, timestep in zip(seen[1:], scheduler.timesteps[1:], strict=True):
        expected = scheduler.add_noise(masked.latents, masked.noise, timestep[None])
        assert torch.allclose(sample[kept], expected[kept], atol=1e-6)
        assert not torch.isclose(sample, expected, atol=1e-3)[~kept].all()


def test_a_unet_that_takes_masks_is_told_them_and_nothing_is_put_back() -> None:
    pool, tracks = LatentPool(), [make_track(seed, masked=make_masked(seed, is_told=True)) for seed in (1, 2)]
    for track in tracks:
        pool.join(track)

    def watched(sample: torch.Tensor, timestep: torch.Tensor, told: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert sample.shape == (5, 9, *SHAPE[1:])
        for row, track in zip(range(5), (tracks[0], tracks[0], tracks[1], tracks[1], tracks[1]), strict=True):
            assert track.masked is not None
            assert torch.equal(sample[row, 4:5], track.masked.mask.float())
            assert torch.equal(sample[row, 5:], track.masked.latents)
        return denoise(sample[:, :4], timestep, told)

    while not tracks[0].is_done:
        pool.step(tracks, watched, 5)
    plain = run(LatentPool(), [make_track(seed) for seed in (1, 2)], padding=1)
    assert all(torch.equal(pool.state(track)[0], one) for track, one in zip(tracks, plain, strict=True))


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


def no_memory(*_: Any, **__: Any) -> torch.Tensor:
    raise MemoryError


def test_images_that_find_no_memory_leave_the_pool_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tracks = LatentPool(), [make_track(seed, rows=1) for seed in range(9)]
    expected = [run(LatentPool(), [make_track(seed, rows=1)]) for seed in range(9)]
    for track in tracks[:8]:
        pool.join(track)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", no_memory)
        with pytest.raises(MemoryError):
            pool.join(tracks[8])
    pool.join(tracks[8])
    misshapen = make_track(10)
    misshapen.latents = misshapen.latents[:, :2]
    with pytest.raises(RuntimeError):
        pool.join(misshapen)
    while not tracks[0].is_done:
        pool.step(tracks, denoise)
    for latents, one in zip(taken(pool, tracks), expected, strict=True):
        assert torch.allclose(latents, one[0], atol=1e-6)
    assert pool.is_empty
    assert pool._capacity == 16


def test_predictions_are_of_the_guided_output_and_of_the_steps_that_want_them() -> None:
    """Beside others that want none, and changing nothing: the x of the call and its output, by the table's numbers."""
    seen, made = list[tuple[torch.Tensor, torch.Tensor]](), list[list[torch.Tensor | None]]()

    def watched(sample: torch.Tensor, timestep: torch.Tensor, told: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = denoise(sample, timestep, told)
        seen.append((sample, output))
        return output

    tracks = [make_track(1, 1, steps=6), make_track(2, 2, steps=6, predict_every=2), make_track(3, 1, steps=6)]
    pool, trajectory = LatentPool(), tracks[1].trajectory
    for track in tracks:
        pool.join(track)
    while not tracks[0].is_done:
        pool.step(tracks, watched)
        made.append([track.predicted for track in tracks])
        tracks[1].predicted = None
    for k, ((sample, output), predicted) in enumerate(zip(seen, made, strict=True)):
        assert (predicted[0], predicted[2]) == (None, None)
        if k % 2 == 0:
            assert predicted[1] is None
            continue
        guided = output[2] + 5.0 * (output[1] - output[2])
        expected = trajectory.p0[k] * sample[1] + trajectory.q0[k] * guided
        assert predicted[1] is not None
        assert torch.allclose(predicted[1], expected, atol=1e-4)
    plain = run(LatentPool(), [make_track(1, 1, steps=6), make_track(2, 2, steps=6), make_track(3, 1, steps=6)])
    for track, expected in zip(tracks, plain, strict=True):
        assert torch.equal(pool.state(track)[0], expected)


@pytest.mark.parametrize("is_told", [False, True])
def test_predictions_of_masked_pictures_keep_what_is_put_back(is_told: bool) -> None:
    mask = torch.zeros((1, *SHAPE[1:]), dtype=torch.bool)
    mask[:, 2:5, 3:] = True
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    masked, predicted = Masked(mask, latents, None if is_told else torch.zeros(SHAPE)), torch.full(SHAPE, 7.0)
    kept = predicted if is_told else latents
    assert torch.equal(masked.around(predicted), torch.where(mask, predicted, kept))


def adapted_denoise(
    sample: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """As `denoise`, and each row's adapter takes part."""
    told = conditioning["lora"][conditioning["lora_index"]].mean(dim=1)
    return denoise(sample, timestep, conditioning) + told[:, None, None, None]


def test_rows_with_different_adapters_and_without_do_not_notice_each_other() -> None:
    unet = adapted(component("unet"), LAYOUTS["unet"])
    vectors = {value: torch.full((LAYOUTS["unet"].size,), value) for value in (0.1, -0.2)}
    adapters = [Adapter((("a", value, False),), {"unet": one}, 0.0) for value, one in vectors.items()]

    def tracks() -> list[Track]:
        chosen = [adapters[0], None, adapters[1], adapters[0]]
        return [make_track(seed, rows=1 + seed % 2, adapter=one) for seed, one in enumerate(chosen)]

    def stepped(some: list[Track], padding: int = 0) -> list[torch.Tensor]:
        pool = LatentPool(adapters=AdapterStack(unet))
        for track in some:
            pool.join(track)
        while not some[0].is_done:
            pool.step(some, adapted_denoise, sum(track.rows for track in some) + padding)
        return taken(pool, some)

    together, left = stepped(tracks(), padding=2), tracks()
    for one, track in zip(together, tracks(), strict=True):
        assert torch.allclose(one, stepped([track])[0], atol=1e-5)
    plain = stepped([make_track(seed, rows=1 + seed % 2) for seed in range(4)])
    changed = [not torch.allclose(one, other, atol=1e-3) for one, other in zip(together, plain, strict=True)]
    assert changed == [True, False, True, True]
    stepped(left)
    assert [track.adapter for track in left] == [None] * 4, "let go of"
