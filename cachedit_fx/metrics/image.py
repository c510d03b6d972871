"""How far pictures are from their references: MSE, PSNR, SSIM.

`Source` in `metrics.pictures` has the ways to give pictures. All channels count alike; a value is over all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from cachedit_fx.metrics.pictures import PictureError, Source, paired

Window: TypeAlias = Literal["gaussian", "uniform"]


def mse(pictures: Source, reference: Source) -> list[float]:
    """Mean squared error of each picture, in squared 8-bit units: from 0 to 65025.

        255^2 mean((x - y)^2)          x, y in 0..1, the mean over pixels and channels, in float64

    It equals scikit-image's `mean_squared_error` of uint8 pictures.
    """
    return [_mse(picture, other) * 255**2 for _, picture, other in paired(pictures, reference)]


def psnr(pictures: Source, reference: Source) -> list[float]:
    """Peak signal-to-noise ratio of each picture, in dB; infinite for identical ones.

        -10 log10 mean((x - y)^2)      x, y in 0..1, the mean over pixels and channels, in float64

    It equals scikit-image's `peak_signal_noise_ratio`.
    """
    errors = [_mse(picture, other) for _, picture, other in paired(pictures, reference)]
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def _mse(picture: np.ndarray, reference: np.ndarray) -> float:
    return float(np.square(picture - reference).mean())


def mean_psnr(values: Sequence[float]) -> float:
    """The mean over the finite values, in dB; infinite if there are none, all pictures being identical."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.mean(finite) if finite else math.inf


def ssim(pictures: Source, reference: Source, window: Window = "gaussian") -> list[float]:
    """Structural similarity of each picture (Wang et al. 2004), at most 1.

    Means, variances and covariance are taken in a window around each pixel, of each channel separately. The value is
    the mean over pixels and channels. K1 = 0.01, K2 = 0.03, data range 1, float64. The libraries' defaults differ:

    - "gaussian": 11 x 11, sigma 1.5, covariances over n, every pixel, the borders mirrored. torchmetrics' default.
    - "uniform": 7 x 7, covariances over n - 1, only pixels whose window is inside. scikit-image's default.

    Args:
        pictures, reference: 6 pixels or more wide and high, 7 with the uniform window.
        window: one of these two.

    Raises:
        ImportError: if the library is not installed.
        PictureError: if a picture is too small.
    """
    if window not in _WINDOWS:
        raise PictureError(f"window={window!r} is not allowed: it must be one of {', '.join(_WINDOWS)}")
    size, compute = _WINDOWS[window]
    values = []
    for name, picture, other in paired(pictures, reference):
        if min(picture.shape[:2]) < size:
            raise PictureError(f"picture {name} is too small for SSIM: it must be {size} pixels or more on a side")
        values.append(compute(picture, other))
    return values


def _gaussian(picture: np.ndarray, reference: np.ndarray) -> float:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    left, right = (torch.from_numpy(values).movedim(-1, 0)[None] for values in (picture, reference))
    value = structural_similarity_index_measure(left, right, data_range=1.0)
    assert isinstance(value, torch.Tensor)
    return float(value)


def _uniform(picture: np.ndarray, reference: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    return float(structural_similarity(picture, reference, channel_axis=2, data_range=1.0))


_WINDOWS = {"gaussian": (6, _gaussian), "uniform": (7, _uniform)}
"""Name -> pixels that a side must have, and the value of one picture. Mirrored borders need half a window."""
