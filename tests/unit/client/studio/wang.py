"""SSIM once more, written from the paper alone, to hold scikit-image's options to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def ssim_of_wang(x: Any, y: Any) -> float:
    """Wang, Bovik, Sheikh, Simoncelli (2004), equation 13, over every whole window of 11 x 11; the mean of channels.

    `x` and `y`: uint8 [height, width, channels].
    """
    offsets = np.arange(11) - 5.0
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def mean(values: Array) -> Array:
        rows = np.lib.stride_tricks.sliding_window_view(values, 11, axis=0)
        windows = np.lib.stride_tricks.sliding_window_view(rows, 11, axis=1)
        averages: Array = np.einsum("ijckl,kl->ijc", windows, weights)
        return averages

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    index = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(index.mean())
