"""How far pictures are from a reference: PSNR, SSIM."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each picture of a batch, values in 0..1, in dB."""
    errors = (pictures.double() - reference.double()).square().flatten(1).mean(1).tolist()
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def mean_psnr(values: Sequence[float]) -> float:
    """The mean over those that are finite; infinite where none is, all pictures being equal."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.mean(finite) if finite else math.inf


def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> list[float] | None:
    """Structural similarity of each picture of a batch, values in 0..1; None where torchmetrics is not installed."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    found = structural_similarity_index_measure(pictures, reference, data_range=1.0, reduction="none")
    return found.reshape(-1).tolist()
