"""Pictures one after another, as GIF or MP4."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve_client._extras import extra, require

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image

    _Frame = npt.NDArray[np.uint8]  # [height, width, 3]

__all__ = ["FILM_SUFFIXES", "check_encoder", "check_one_size", "film", "frame_counts"]

FILM_SUFFIXES: Final = (".gif", ".mp4")
_CODEC: Final = "libx264"
_BT709: Final = 1  # its number in ITU-T H.273, of primaries as of the transfer function
_CRF: Final = "18"  # of 0 to 51, less is better; hardly to be told from the pictures
_GIF_TICK: Final = 0.01  # seconds; a GIF's durations are whole numbers of it


def check_encoder(suffix: str) -> None:
    """Raises UnsupportedError where a film with this suffix cannot be written here."""
    if suffix == ".gif":
        require("tools", "imageio.v3")
    else:
        with extra("tools"):
            import av
        try:
            av.Codec(_CODEC, "w")
        except ValueError as error:
            raise UnsupportedError(
                f"this PyAV has no encoder {_CODEC}; install one from PyPI (pip install av), or write a .gif"
            ) from error


def film(pictures: Sequence[PIL.Image.Image], durations: Sequence[float], suffix: str, fps: int) -> bytes:
    """A GIF that repeats, or an MP4 (H.264) of `fps` frames a second; `durations` in seconds.

    A GIF has a palette of 256 colours for each picture, and pictures that are the same one after another become one
    that lasts as long as all of them. An MP4's width and height are even: a last odd row or column is repeated.

    Raises InvalidArgumentError where the sizes differ, UnsupportedError without imageio or PyAV.
    """
    check_one_size(pictures)
    frames = [_array(one) for one in pictures]
    return _gif(frames, durations) if suffix == ".gif" else _mp4(frames, frame_counts(durations, fps), fps)


def _gif(frames: Sequence[_Frame], durations: Sequence[float]) -> bytes:
    with extra("tools"):
        import imageio.v3 as iio

    milliseconds = [round(1000 * _GIF_TICK) * ticks for ticks in frame_counts(durations, 1 / _GIF_TICK)]
    # Of one picture Pillow takes a number only.
    duration = milliseconds if len(frames) > 1 else milliseconds[0]
    return bytes(iio.imwrite("<bytes>", frames, extension=".gif", duration=duration, loop=0))


def _mp4(frames: Sequence[_Frame], counts: Sequence[int], fps: int) -> bytes:
    """Each frame so many times.

    By PyAV itself: imageio's writer over it does not say how RGB became YUV, and of high pictures players then take the
    standard of HD, BT.709, where it was BT.601, which makes reds orange. Here it is BT.709, and said.
    """
    with extra("tools"):
        import av
        from av.video.reformatter import ColorRange, Colorspace

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(_CODEC, rate=fps, options={"crf": _CRF})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width, _ = _even(frames[0]).shape
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = _BT709
        time = 0
        for frame, count in zip(frames, counts, strict=True):
            shown = av.VideoFrame.from_ndarray(_even(frame), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            for _ in range(count):
                shown.pts, time = time, time + 1
                container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return file.getvalue()


def frame_counts(durations: Sequence[float], rate: float) -> list[int]:
    """How many of `rate` frames a second each picture gets, one at least; what is rounded off goes to the next."""
    counts: list[int] = []
    for end in accumulate(durations):
        counts.append(max(1, round(end * rate) - sum(counts)))
    return counts


def check_one_size(pictures: Sequence[PIL.Image.Image]) -> None:
    """Raises InvalidArgumentError where pictures differ in size."""
    first = pictures[0].size
    for number, one in enumerate(pictures, 1):
        if one.size != first:
            raise InvalidArgumentError(
                f"scene {number} is {one.width}x{one.height} and scene 1 {first[0]}x{first[1]}, and a film has one "
                "size; give width and height for all, or write a contact sheet (.png)"
            )


def _array(picture: PIL.Image.Image) -> _Frame:
    import numpy as np

    return np.asarray(picture.convert("RGB"))


def _even(frame: _Frame) -> _Frame:
    """H.264's colours have half the resolution, hence even sides."""
    import numpy as np

    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame
