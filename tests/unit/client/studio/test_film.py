"""GIF and MP4: frames, durations, sizes."""

from __future__ import annotations

import io

import av
import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest
from av.video.reformatter import ColorRange, Colorspace

from diffuserve_client import InvalidArgumentError
from diffuserve_client._studio.film import film, frame_counts

COLOURS = [(220, 30, 30), (30, 160, 60), (35, 60, 220)]


def pictures(size: tuple[int, int] = (64, 48)) -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", size, colour) for colour in COLOURS]


def test_a_gif_keeps_pictures_and_durations() -> None:
    with PIL.Image.open(io.BytesIO(film(pictures(), [0.5, 1.25, 0.02], ".gif", 25))) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)  # type: ignore[attr-defined]
        durations = []
        for place, colour in enumerate(COLOURS):
            gif.seek(place)
            durations.append(gif.info["duration"])
            assert gif.convert("RGB").getpixel((5, 5)) == colour
    assert durations == [500, 1250, 20]


@pytest.mark.parametrize("count", [1, 3])
def test_a_gif_of_one_picture(count: int) -> None:
    with PIL.Image.open(io.BytesIO(film(pictures()[:1] * count, [0.25] * count, ".gif", 25))) as gif:
        assert gif.info["duration"] == 250 * count
        assert gif.convert("RGB").getpixel((5, 5)) == COLOURS[0]


def test_equal_pictures_of_a_gif_are_one_that_lasts_as_long() -> None:
    first, second, _ = pictures()
    with PIL.Image.open(io.BytesIO(film([first, first, second], [0.5, 0.25, 1], ".gif", 25))) as gif:
        assert gif.n_frames == 2  # type: ignore[attr-defined]
        assert gif.info["duration"] == 750


@pytest.mark.parametrize("size", [(64, 48), (33, 47)])
def test_an_mp4_has_each_pictures_frames(size: tuple[int, int]) -> None:
    data = film(pictures(size), [0.5, 1.0, 0.02], ".mp4", 10)
    frames = iio.imread(data, plugin="pyav")
    meta = iio.immeta(data, plugin="pyav")
    assert frames.shape == (5 + 10 + 1, size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    assert (meta["fps"], meta["codec"]) == (10, "h264")
    for place, frame in zip([*[0] * 5, *[1] * 10, 2], frames, strict=True):
        assert np.abs(frame[10, 10].astype(int) - COLOURS[place]).max() <= 3


def test_an_mp4_says_what_its_colours_are() -> None:
    """Otherwise players guess by the height, and show other reds."""
    with av.open(io.BytesIO(film(pictures(), [1] * 3, ".mp4", 10)), "r") as container:
        frame = next(container.decode(video=0))
        told = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
        assert told == (Colorspace.ITU709, ColorRange.MPEG, 1, 1), "1 is BT.709's number"
        # ITU-R BT.709: luma's weights of red, green and blue, then 219 steps from 16
        luma = 16 + 219 / 255 * (np.array([0.2126, 0.7152, 0.0722]) @ COLOURS[0])
        assert frame.to_ndarray()[10, 10] == pytest.approx(luma, abs=2)


def test_rounding_does_not_add_up() -> None:
    assert sum(frame_counts([0.05] * 10, 25)) == 12
    assert frame_counts([1 / 3] * 3, 25) == [8, 9, 8]
    assert frame_counts([0.001, 1], 25) == [1, 24]


def test_sizes_that_differ_are_refused() -> None:
    odd = [*pictures(), PIL.Image.new("RGB", (64, 64))]
    for suffix in (".gif", ".mp4"):
        with pytest.raises(InvalidArgumentError, match="scene 4 is 64x64 and scene 1 64x48"):
            film(odd, [1] * 4, suffix, 25)
