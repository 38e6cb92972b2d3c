"""How far two pictures are apart, by scikit-image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diffuserve_client._extras import extra

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["DATA_RANGE", "SSIM_WINDOW", "IncomparableError", "Similarity", "similarity_of"]

#: The pictures are 8-bit RGB: from 0 to 255.
DATA_RANGE: Final = 255
#: Pixels a side: a Gaussian of sigma 1.5, cut off at 3.5 sigma.
SSIM_WINDOW: Final = 11
_SIGMA: Final = 1.5


class IncomparableError(ValueError):
    """Two pictures that cannot be measured against each other; the text says why."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """`mse` in squared 8-bit steps over all pixels and channels; `psnr_db` infinite where it is 0; `ssim` at most 1."""

    mse: float
    psnr_db: float
    ssim: float

    @property
    def is_identical(self) -> bool:
        return math.isinf(self.psnr_db)

    @property
    def psnr_text(self) -> str:
        return "infinite" if self.is_identical else f"{self.psnr_db:.2f} dB"

    def as_text(self) -> str:
        return "identical" if self.is_identical else f"SSIM {self.ssim:.3f}, {self.psnr_text}"

    def as_json(self) -> dict[str, Any]:
        """JSON has no infinite number: PSNR is then the text Infinity, which float() and Number() read."""
        psnr = "Infinity" if self.is_identical else self.psnr_db
        return {"mse": self.mse, "psnr_db": psnr, "ssim": self.ssim}


def similarity_of(picture: PIL.Image.Image, baseline: PIL.Image.Image) -> Similarity:
    """MSE, PSNR and SSIM of a picture, in RGB.

    SSIM is that of Wang, Bovik, Sheikh and Simoncelli, Image Quality Assessment: From Error Visibility to Structural
    Similarity (2004): a Gaussian window, K1 = 0.01, K2 = 0.03, biased variances; the mean over the channels.

    Raises IncomparableError where the sizes differ, or a side is below the window.
    """
    import numpy as np

    with extra("tools"):
        from skimage import metrics

    if picture.size != baseline.size:
        sizes = [f"{one.width}x{one.height}" for one in (picture, baseline)]
        raise IncomparableError(f"{sizes[0]} is not the baseline's size, {sizes[1]}")
    if min(picture.size) < SSIM_WINDOW:
        raise IncomparableError(
            f"{picture.width}x{picture.height} is below SSIM's window of {SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    ours, theirs = (np.asarray(one.convert("RGB")) for one in (picture, baseline))
    mse = float(metrics.mean_squared_error(theirs, ours))
    ssim = metrics.structural_similarity(
        theirs,
        ours,
        data_range=DATA_RANGE,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=_SIGMA,
        use_sample_covariance=False,
    )
    # scikit-image divides by the error, and warns where it is 0.
    psnr = math.inf if mse == 0 else float(metrics.peak_signal_noise_ratio(theirs, ours, data_range=DATA_RANGE))
    return Similarity(mse=mse, psnr_db=psnr, ssim=float(ssim))
