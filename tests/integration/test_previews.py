"""Previews through a real Triton: what comes, when, and how close the last one is to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuserve.sampling import SAMPLERS
from diffuserve_client import Client, Event, GenerateRequest, PictureEvent

PROMPT = "a large red circle on a blue background"


def psnr(image: Image.Image, other: Image.Image) -> float:
    """In dB."""
    one, two = (np.asarray(each.convert("RGB"), dtype=np.float64) for each in (image, other))
    return float(-10 * np.log10(np.mean((one - two) ** 2) / 255**2))


def streamed(client: Client, **values: Any) -> list[Event]:
    return list(client.stream(GenerateRequest(**{"prompt": PROMPT, "seed": 3, "steps": 8, **values})))


def previews_of(events: Sequence[Event], index: int = 0) -> list[PictureEvent]:
    """One image's previews, once all is in order: they rise, and its picture is the last of it."""
    own = [event for event in events if event.index == index and event.kind in ("preview", "image")]
    assert [event.kind for event in own] == ["preview"] * (len(own) - 1) + ["image"]
    steps = [event.step for event in own[:-1]]
    assert steps == sorted(set(steps))
    return [event for event in own[:-1] if isinstance(event, PictureEvent)]


def complete(client: Client, steps: list[int], **values: Any) -> list[Event]:
    """The events of a request all of whose previews came: where the machine is busy, the server may skip some."""
    for _ in range(5):
        events = streamed(client, **values)
        if [event.step for event in previews_of(events)] == steps:
            break
    assert [event.step for event in previews_of(events)] == steps
    return events


def test_they_come_in_order_and_the_last_is_close_to_the_picture(client: Client) -> None:
    events = complete(client, [2, 4, 6, 8], preview_every=2, progress_every=4)
    previews, picture = previews_of(events), events[-1]
    assert isinstance(picture, PictureEvent)
    assert {(event.steps, event.seed) for event in previews} == {(8, 3)}
    assert [one.image.size for one in previews] == [(8, 8)] * 4
    assert previews[0].info == {"width": 8, "height": 8}
    reduced = picture.image.resize((8, 8), Image.Resampling.BOX)
    close = [psnr(one.image, reduced) for one in previews]
    assert close[-1] > 18
    assert close[-1] > close[0] + 3
    assert [event.step for event in events if event.kind == "progress"] == [4]


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun", "dpmpp_2m_sde"])
def test_the_picture_is_the_same_to_the_bit(client: Client, sampler: str) -> None:
    plain, watched = (streamed(client, sampler=sampler, preview_every=every)[-1] for every in (0, 1))
    assert plain.data == watched.data
    assert plain.info["joined_at_step"] != watched.info["joined_at_step"]


def test_every_sampler_has_previews_that_end_as_its_picture(client: Client) -> None:
    # A step before the last one, where there still is noise to be taken off.
    def ask(sampler: str) -> list[Event]:
        return streamed(client, sampler=sampler, steps=20, preview_every=19)

    with ThreadPoolExecutor(len(SAMPLERS)) as pool:
        answers = dict(zip(SAMPLERS, pool.map(ask, SAMPLERS), strict=True))
    close = {}
    for sampler, events in answers.items():
        for preview in previews_of(events):
            assert preview.step == 19
            picture = events[-1]
            assert isinstance(picture, PictureEvent)
            close[sampler] = psnr(preview.image, picture.image.resize((8, 8), Image.Resampling.BOX))
    assert len(close) >= len(SAMPLERS) - 3, "most came in time"
    assert min(close.values()) > 16, close


def test_several_images_and_pictures_to_begin_with(client: Client) -> None:
    start = streamed(client)[-1]
    events = streamed(
        client,
        num_images=3,
        preview_every=1,
        init_image=start.data,
        strength=0.5,
        steps=20,
        width=96,
        image_format="webp",
    )
    for index in range(3):
        for preview in previews_of(events, index):
            assert (preview.seed, preview.steps) == (3 + index, 10)
            assert preview.image.size == (12, 8)
            assert preview.image.format == "WEBP"
    assert sum(len(previews_of(events, index)) for index in range(3)) >= 15, "most came in time"
