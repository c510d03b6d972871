"""Storing what a region adds to the values that run through it, and adding it again where the region is bypassed.

    store:   residual = result - base            apply:   result = base + sum_j c_j residual_j

One residual of weight 1 repeats the latest computed step; more of them, with a calibrator's weights, predict.

Residuals are kept one precision up (float32 for 16-bit values, float64 for float32 ones): base + (result - base) in the
values' own precision is not `result`, and reuse on identical inputs must reproduce it to the bit. It does while the
result is not smaller than its base by a factor of 2^12 (float16), 2^15 (bfloat16) or 2^28 (float32); beyond, the error
is a rounding of the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


def residual_dtype(value: torch.Tensor, kind: str = "wider") -> torch.dtype:
    """The dtype that the residual of `value` is kept in: "wider" than its own, "float32", or its own ("model"). Whole
    numbers stay what they are. Metal has no float64: there, float32 stays float32."""
    if kind == "model" or not value.is_floating_point():
        return value.dtype
    wider = torch.float32 if kind == "float32" else _WIDER.get(value.dtype, value.dtype)
    return torch.float32 if wider is torch.float64 and value.device.type == "mps" else wider


def residual_like(result: torch.Tensor, kind: str = "wider") -> torch.Tensor:
    """An empty, contiguous buffer for the residual of `result`, usable with and without inference mode."""
    with torch.inference_mode(False):
        return torch.empty(result.shape, dtype=residual_dtype(result, kind), device=result.device)


def laid_out(value: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """`value` with `strides`, copied where it has others: matrix products round differently on another layout. Where
    elements would share memory (an expanded dimension) it stays as it is."""
    if value.stride() == tuple(strides) or 0 in strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def store_residual(result: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = result - base; out = result where there is no base. Any shape; `out` from `residual_like(result)`."""
    out.copy_(result.detach())
    if base is not None:
        out.sub_(base.detach())


def apply_residual(
    base: torch.Tensor | None, stored: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """base + sum_j weights[j] * stored[j] in `dtype`, summed in the precision of `stored`; no base counts as zero.

    A new tensor of the stored ones' shape. One value of weight 1 gives back exactly the result that it was stored from.
    """
    terms = [(value, weight) for value, weight in zip(stored, weights, strict=True) if weight]
    (value, weight), *others = terms
    if base is None and weight == 1 and not others:
        return value.to(dtype, copy=True)
    total = value * weight if base is None else torch.add(base, value, alpha=weight)
    for value, weight in others:
        total.add_(value, alpha=weight)
    return total.to(dtype)
