"""What a ControlNet that is built into a UNet looks at: one picture for each row of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from diffuserve.spec import CONTROL, CONTROL_SCALE

if TYPE_CHECKING:
    from diffuserve.engine.track import Track

__all__ = ["Control", "ControlRows"]

_NOTHING: Final = torch.empty(0)


@dataclass(frozen=True, eq=False, slots=True)
class Control:
    """What an image is controlled by. The images of a request share the picture, [3, H, W] uint8."""

    picture: torch.Tensor
    scale: float


class ControlRows:
    """The UNet's `control` [rows, 3, H, W] in 0 to 1 and `control_scale` [rows], for the images of one group.

    Controls are as large as pictures, so they lie in one tensor of the type that the engine takes, which is what calls
    are given. It grows to the most rows that a call had, and a row is written only where its picture is another than
    before. A row without a control is black, and its scale 0.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._rows = _NOTHING
        self._pictures: list[torch.Tensor | None] = []

    def told(self, tracks: Sequence[Track], rows: int) -> dict[str, torch.Tensor]:
        """Both inputs of a call of `rows` rows: each image's, then the last one's as padding.

        They hold until this is called again.
        """
        controls = [track.control for track in tracks for _ in range(track.rows)]
        controls += controls[-1:] * (rows - len(controls))
        self._reserve(rows, tracks[0].group.height, tracks[0].group.width)
        for row, control in enumerate(controls):
            picture = None if control is None else control.picture
            if picture is not self._pictures[row]:
                self._rows[row] = 0 if picture is None else picture.to(torch.float32) / 255
                self._pictures[row] = picture
        scales = [0.0 if control is None else control.scale for control in controls]
        return {CONTROL: self._rows[:rows], CONTROL_SCALE: torch.tensor(scales, dtype=self._dtype, device=self._device)}

    def release(self) -> None:
        """Give the memory back."""
        self._rows, self._pictures = _NOTHING, []

    def _reserve(self, rows: int, height: int, width: int) -> None:
        capacity = len(self._pictures)
        if capacity < rows:
            self.release()  # first, so that there are never two
            capacity = max(rows, 2 * capacity)
            self._rows = torch.zeros(capacity, 3, height, width, dtype=self._dtype, device=self._device)
            self._pictures = [None] * capacity
