"""Metrics of pictures: PSNR, SSIM, MSE, LPIPS, FID, CLIP score, ImageReward.

    from cachedit_fx.metrics import psnr
    psnr("cached/", "uncached/")                     a value for each pair of files

Importing this imports numpy alone. `compare` computes several metrics at once, as `cachedit metrics` does.
docs/metrics.md has the definitions in one table.
"""

from cachedit_fx.metrics.image import mean_psnr, mse, psnr, ssim
from cachedit_fx.metrics.pictures import PictureError, Source, paired
from cachedit_fx.metrics.scores import METRICS, Inputs, Score, Scores, Weights, compare

__all__ = [
    "METRICS",
    "Inputs",
    "PictureError",
    "Score",
    "Scores",
    "Source",
    "Weights",
    "compare",
    "mean_psnr",
    "mse",
    "paired",
    "psnr",
    "ssim",
]
