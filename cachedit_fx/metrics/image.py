"""How far pictures are from a reference: PSNR, SSIM."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each picture, in dB; infinite for identical ones.

    Args:
        pictures, reference: [B, 3, H, W], floats in 0..1.
    """
    errors = (pictures.double() - reference.double()).square().flatten(1).mean(1).tolist()
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def mean_psnr(values: Sequence[float]) -> float:
    """The mean over the finite values, in dB; infinite if there are none, all pictures being identical."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.mean(finite) if finite else math.inf


def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> list[float] | None:
    """Structural similarity of each picture, at most 1; None if torchmetrics is not installed.

    Args:
        pictures, reference: [B, 3, H, W], floats in 0..1.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    values = structural_similarity_index_measure(pictures, reference, data_range=1.0, reduction="none")
    return values.reshape(-1).tolist()
