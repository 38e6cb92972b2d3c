"""Snapshots: what is resumed goes on to the very same numbers, and nothing but our own bytes is read."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve.engine import HIDDEN_STATES, Group, LatentPool, Masked, Track
from diffuserve.errors import InvalidArgumentError
from diffuserve.request import GenerateRequest, ResolvedRequest
from diffuserve.sampling import HISTORY, SAMPLERS, Trajectory, TrajectoryCompiler
from diffuserve.sampling.matrix import REFERENCE
from diffuserve.snapshot import ImageState, Snapshot, decode_snapshot, encode_snapshot, lags_used, rest_of

KEY = b"k" * 32
SHAPE = (4, 6, 8)
COMPILER = TrajectoryCompiler(REFERENCE)


def resolved(steps: int = 6, **values: object) -> ResolvedRequest:
    request = GenerateRequest(prompt="a ring", **{"seed": 7, "num_images": 3, **values})  # type: ignore[arg-type]
    return ResolvedRequest(
        request=request,
        checkpoint="shapes",
        width=64,
        height=48,
        steps=steps,
        guidance_scale=5.0,
        sampler="heun",
        sigma_schedule=None,
        seed=7,
        rows=2,
    )


def masked(seed: int = 3) -> Masked:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn((2, *SHAPE), generator=generator)
    return Masked(torch.rand((1, *SHAPE[1:]), generator=torch.Generator().manual_seed(3)) < 0.5, latents, noise)


def snapshot(trajectory: Trajectory | None = None, evaluation: int = 2, has_mask: bool = False) -> Snapshot:
    trajectory = trajectory or COMPILER("heun", 6)
    generator = torch.Generator().manual_seed(1)
    images = tuple(
        ImageState(
            index,
            evaluation + index,
            steps=1,
            draws=3 + index,
            latents=torch.randn(SHAPE, generator=generator),
            history=torch.randn((HISTORY, *SHAPE), generator=generator),
            masked=masked(index) if has_mask else None,
        )
        for index in (0, 2)
    )
    return Snapshot(resolved=resolved(), weights="abc", trajectory=trajectory, first=0, images=images).cut()


def denoise(sample: torch.Tensor, timestep: torch.Tensor, _: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Each of the latents' channels mixed with every other that is told."""
    return sample[:, :4].sin() + sample.mean(dim=1, keepdim=True) + timestep[:, None, None, None] / 1000


def begin(trajectory: Trajectory, masked: Masked | None = None) -> Track:
    generator = torch.Generator().manual_seed(7)
    return Track(
        group=Group("any", 48, 64),
        trajectory=trajectory,
        guidance_scale=1.0,
        latents=torch.randn((1, *SHAPE), generator=generator)[0] * trajectory.initial_scale,
        conditioning={HIDDEN_STATES: torch.zeros(1, 2, 2)},
        generator=generator,
        masked=masked,
    )


def go_on(state: ImageState, trajectory: Trajectory) -> Track:
    generator = torch.Generator().manual_seed(7)
    for _ in range(state.draws):
        torch.randn((1, *SHAPE), generator=generator)
    track = begin(trajectory, state.masked)
    return replace(track, latents=state.latents, history=state.history, generator=generator, steps_before=state.steps)


def run(pool: LatentPool, track: Track, evaluations: int) -> torch.Tensor:
    pool.join(track)
    for _ in range(evaluations):
        pool.step([track], denoise)
    return pool.state(track)[0]


def interrupted(trajectory: Trajectory, evaluation: int, masked: Masked | None = None) -> torch.Tensor:
    pool, track = LatentPool(), begin(trajectory, masked)
    pool.join(track)
    for _ in range(evaluation):
        pool.step([track], denoise)
    latents, history = pool.state(track)
    draws = 1 + int(trajectory.draws[:evaluation].sum())
    state = ImageState(0, evaluation, track.steps_done(evaluation), draws, latents, history, masked)
    taken = Snapshot(resolved=resolved(), weights="abc", trajectory=trajectory, first=0, images=(state,)).cut()
    read = decode_snapshot(encode_snapshot(taken, KEY), KEY)
    rest = read.remaining(read.images[0])
    return run(LatentPool(), go_on(read.images[0], rest), rest.evaluations)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_goes_on_from_every_evaluation_to_the_very_same_latents(sampler: str) -> None:
    trajectory = COMPILER(sampler, 7)
    whole = run(LatentPool(), begin(trajectory), trajectory.evaluations)
    for evaluation in range(trajectory.evaluations):
        assert torch.equal(interrupted(trajectory, evaluation), whole), evaluation


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_with_a_mask_too(sampler: str) -> None:
    trajectory = COMPILER(sampler, 5)
    put_back = masked()
    for one in (put_back, replace(put_back, noise=None)):
        whole = run(LatentPool(), begin(trajectory, one), trajectory.evaluations)
        for evaluation in range(trajectory.evaluations):
            assert torch.equal(interrupted(trajectory, evaluation, one), whole), evaluation


@pytest.mark.parametrize("has_mask", [False, True])
def test_what_is_read_is_what_was_written(has_mask: bool) -> None:
    wrote = snapshot(has_mask=has_mask)
    read = decode_snapshot(encode_snapshot(wrote, KEY), KEY)
    assert (read.resolved, read.weights, read.first) == (wrote.resolved, "abc", 2)
    assert read.trajectory.evaluations == wrote.trajectory.evaluations
    np.testing.assert_array_equal(read.trajectory.coefficients(), wrote.trajectory.coefficients())
    np.testing.assert_array_equal(read.trajectory.timestep, wrote.trajectory.timestep.astype(np.float32))
    for name in ("remember", "draws", "steps_done"):
        np.testing.assert_array_equal(getattr(read.trajectory, name), getattr(wrote.trajectory, name))
    for one, other in zip(read.images, wrote.images, strict=True):
        assert (one.index, one.evaluation, one.steps, one.draws) == (
            other.index,
            other.evaluation,
            other.steps,
            other.draws,
        )
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.history, other.history)
        assert (one.masked is None, other.masked is None) == (not has_mask, not has_mask)
        if one.masked is not None and other.masked is not None:
            for name in ("mask", "latents", "noise"):
                assert torch.equal(getattr(one.masked, name), getattr(other.masked, name))
    assert decode_snapshot(base64.b64encode(encode_snapshot(wrote, KEY)), KEY).weights == "abc"


def test_only_the_history_that_is_read_again_is_kept() -> None:
    assert lags_used(COMPILER("euler", 5)) == 0
    lags = {name: lags_used(rest_of(COMPILER(name, 8), 4)) for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "lms")}
    assert lags == {"ddim": 0, "dpmpp_2m": 1, "dpmpp_3m": 2, "lms": 3}
    last = rest_of(COMPILER("dpmpp_3m", 8), 7)
    assert lags_used(last) <= 2


def test_pictures_are_kept_as_they_came_where_nothing_was_begun() -> None:
    pictures: dict[str, Any] = {"init_image": b"a picture", "mask_image": b"a mask"}
    begun = snapshot()
    asked = replace(begun, resolved=resolved(**pictures))
    waiting = replace(asked, first=0, images=(ImageState.new(0),))
    read, other = (decode_snapshot(encode_snapshot(one, KEY), KEY) for one in (waiting, asked))
    for name, content in pictures.items():
        assert getattr(read.resolved.request, name) == content
        assert getattr(other.resolved.request, name) == b"", "its latents have all of them"
    table = COMPILER("ddim", 8, strength=0.5)
    again = decode_snapshot(encode_snapshot(replace(waiting, trajectory=table), KEY), KEY).trajectory
    assert (again.image_scale, again.initial_scale, again.strength) == (table.image_scale, table.initial_scale, 0.5)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "lms"])
def test_it_takes_at_most_16_kb_beside_the_latents(sampler: str, has_mask: bool) -> None:
    trajectory = COMPILER(sampler, 150)
    taken = snapshot(trajectory, 0, has_mask)
    given = 2 * taken.images[0].latents.numel() if has_mask else 0
    tensors = sum(4 * (image.latents.numel() + image.history.numel() + given) for image in taken.images)
    assert len(encode_snapshot(taken, KEY)) - tensors <= 16_000


def test_the_longest_prompts_fit_with_every_word_an_embedding() -> None:
    taken = snapshot()
    escaped = replace(taken.resolved.request, prompt="\x01" * 8192, negative_prompt="\x01" * 8192)
    words = tuple(f"{number:03}:{'f' * 16}" for number in range(900))
    longest = replace(taken, resolved=replace(taken.resolved, request=escaped, embeddings=words))
    read = decode_snapshot(encode_snapshot(longest, KEY), KEY)
    assert (read.resolved.request, read.resolved.embeddings) == (escaped, words)


def test_altered_foreign_and_truncated_bytes_are_refused() -> None:
    data = encode_snapshot(snapshot(), KEY)
    with pytest.raises(InvalidArgumentError, match="another key"):
        decode_snapshot(data, b"another key of some length......")
    for place in (5, 20, 41, 60, len(data) // 2, len(data) - 1):
        altered = bytearray(data)
        altered[place] ^= 1
        with pytest.raises(InvalidArgumentError, match=r"damaged|another key"):
            decode_snapshot(bytes(altered), KEY)
    for length in (0, 3, 4, 41, 42, 100, len(data) - 1):
        with pytest.raises(InvalidArgumentError, match=r"no snapshot|damaged"):
            decode_snapshot(data[:length], KEY)
    with pytest.raises(InvalidArgumentError, match=r"format is 9, and 3 is read"):
        decode_snapshot(data[:4] + bytes([9]) + data[5:], KEY)
    with pytest.raises(InvalidArgumentError, match="no snapshot"):
        decode_snapshot(b"\x89PNG\r\n" + data, KEY)


def _with_image(taken: Snapshot, **values: object) -> Snapshot:
    return replace(taken, images=(replace(taken.images[0], **values),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda taken: _with_image(taken, index=3), "image 3"),
        (lambda taken: _with_image(taken, evaluation=99), "evaluation 99"),
        (lambda taken: _with_image(taken, draws=10**9), "1000000000 draws"),
        (lambda taken: _with_image(taken, latents=torch.zeros(2, 2)), "shape"),
        (lambda taken: _with_image(taken, history=torch.zeros(9, *SHAPE)), "history of 9"),
        (lambda taken: _with_image(taken, history=torch.zeros(0, *SHAPE, dtype=torch.float16)), "float32"),
        (lambda taken: _with_image(taken, masked=replace(masked(), latents=torch.zeros(9, 6, 8), noise=None)), "given"),
        (lambda taken: _with_image(taken, masked=replace(masked(), mask=torch.ones(1, 1, 1) > 0)), "cannot be read"),
        (lambda taken: _with_image(taken, masked=replace(masked(), mask=torch.ones(1, 9, 9) > 0)), "cannot be read"),
        (lambda taken: replace(taken, images=()), "no image"),
        (lambda taken: replace(taken, images=taken.images[:1] * 2), "one twice"),
        (lambda taken: replace(taken, trajectory=rest_of(taken.trajectory, 99)), "table has 0 bytes"),
        (
            lambda taken: replace(taken, trajectory=replace(taken.trajectory, a=taken.trajectory.a * np.inf)),
            "not finite",
        ),
    ],
)
def test_even_signed_contents_are_checked(broken: object, reason: str) -> None:
    data = encode_snapshot(broken(snapshot()), KEY)  # type: ignore[operator]
    with pytest.raises(InvalidArgumentError, match=reason):
        decode_snapshot(data, KEY)
