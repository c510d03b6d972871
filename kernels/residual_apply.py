"""Bypassing a region: the values that run through it, and what it is predicted to add to them.

    result = base + sum_j c_j residual_j

One residual of weight 1 repeats the latest computed step; more of them, with a calibrator's weights, predict. One pass
whatever the number of residuals: reads the base and each residual, writes the result. All results of a region are
written by one launch; a program finds its result by its number.

Summed in float32, in float64 if a residual is float64; the weights are float32. One residual of weight 1 gives
back, to the bit, the result that `residual_store` took it from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from . import cpu
from .layout import runs_on_triton
from .variants import TYPES

MAX_TERMS = 6
"""Residuals of each result that one launch adds up: those of the fifth order."""


def residual_apply(
    bases: Sequence[torch.Tensor | None],
    stored: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    outs: Sequence[torch.Tensor],
) -> None:
    """Write base + sum_j weights[j] * residual[j] to each of `outs`.

    Args:
        bases: for each result the value that goes on, of its shape and dtype, any strides; no base counts as zero.
        stored: for each result the residuals, one for each weight, of its shape, contiguous; see `residual_dtype`.
        weights: not zero, one at least, the same for all results.
        outs: written; any strides. None of the other tensors.
    """
    tensors = [*bases, *itertools.chain.from_iterable(stored), *outs]
    if runs_on_triton(*tensors) and len(weights) <= MAX_TERMS and all(map(_has_kernel, outs, (t[0] for t in stored))):
        from .residual_apply_triton import launch

        launch(bases, stored, weights, outs)
        return
    for base, residuals, out in zip(bases, stored, outs, strict=True):
        if not _on_cpu(base, residuals, weights, out):
            out.copy_(weighted_sum(base, residuals, weights))


def _has_kernel(out: torch.Tensor, residual: torch.Tensor) -> bool:
    return out.is_contiguous() and {out.dtype, residual.dtype} <= set(TYPES) and out.dtype is not torch.float64


def _on_cpu(
    base: torch.Tensor | None, residuals: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor
) -> bool:
    """One result, in one pass; False if there is no loop."""
    run = cpu.loop_over_rows("residual_apply", (base, out), residuals) if out.is_contiguous() else None
    if run is None:
        return False
    run((base,), cpu.pointers(residuals), cpu.doubles(weights), len(weights), out.data_ptr())
    return True


def weighted_sum(
    base: torch.Tensor | None, residuals: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """The reference: base + sum_j weights[j] * residuals[j], in float32 if the residuals have 16 bits, otherwise
    in their own precision."""
    if base is None and len(weights) == 1 and weights[0] == 1:
        return residuals[0]
    if residuals[0].is_floating_point() and residuals[0].itemsize < 4:
        residuals = [residual.float() for residual in residuals]
    (first, *others), (weight, *more) = residuals, weights
    if base is None:
        total = first * weight
    elif base.dtype != first.dtype == torch.promote_types(base.dtype, first.dtype):
        total = base.to(first.dtype).add_(first, alpha=weight)  # torch.add makes one more tensor of the wider dtype
    else:
        total = torch.add(base, first, alpha=weight)
    for value, weight in zip(others, more, strict=True):
        total.add_(value, alpha=weight)
    return total
