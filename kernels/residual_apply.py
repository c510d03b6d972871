"""Storing what a region adds to the values that run through it, and adding it again where the region is bypassed.

    store:   residual = result - base            apply:   result = base + residual

Residuals are kept one precision up (float32 for 16-bit values, float64 for float32 ones): base + (result - base) in the
values' own precision is not `result`, and reuse on identical inputs must reproduce it to the bit.
"""

from __future__ import annotations

import torch

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


def residual_dtype(value: torch.Tensor) -> torch.dtype:
    """The dtype that the residual of `value` is kept in. Metal has no float64: there, float32 stays float32."""
    wider = _WIDER.get(value.dtype, value.dtype)
    return torch.float32 if wider is torch.float64 and value.device.type == "mps" else wider


def residual_like(result: torch.Tensor) -> torch.Tensor:
    """An empty, contiguous buffer for the residual of `result`, usable with and without inference mode."""
    with torch.inference_mode(False):
        return torch.empty(result.shape, dtype=residual_dtype(result), device=result.device)


def store_residual(result: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = result - base; out = result where there is no base. Any shape; `out` from `residual_like(result)`."""
    out.copy_(result.detach())
    if base is not None:
        out.sub_(base.detach())


def apply_residual(base: torch.Tensor | None, residual: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """base + residual in `dtype`; the stored value itself, as a copy, where there is no base."""
    if base is None:
        return residual.to(dtype, copy=True)
    return torch.add(base, residual).to(dtype)
