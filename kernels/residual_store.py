"""Storing what a region adds to the values that run through it, at a step that computes it.

    residual = result - base

One pass: reads result and base, writes the residual; all results of a region by one launch. This is the whole update of
the state for every calibrator: a predictor that is linear in the values of computed steps (Taylor of any order, FoCa,
Lagrange) keeps the values, and its derivatives are weights (`runtime.calibrators`). A step writes one buffer;
updating n derivatives in place would read n + 1 and write as many.

Residuals are kept one precision up (float32 for 16-bit values, float64 for float32 ones): base + (result - base) in the
values' own precision is not `result`, and reuse on identical inputs must reproduce it to the bit. It does while the
result is not smaller than its base by a factor of 2^12 (float16), 2^15 (bfloat16) or 2^28 (float32); beyond, the error
is a rounding of the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import cpu
from .layout import runs_on_triton
from .variants import TYPES

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


def residual_store(
    results: Sequence[torch.Tensor], bases: Sequence[torch.Tensor | None], outs: Sequence[torch.Tensor]
) -> None:
    """Write result - base to each of `outs`, the result itself if there is no base.

    Args:
        results: any shapes and strides.
        bases: of the results' shapes and dtypes, any strides.
        outs: written; from `residual_like(result)`, and none of the other tensors.
    """
    continued: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for result, base, out in zip(results, bases, outs, strict=True):
        if base is None:
            out.copy_(result)
        elif runs_on_triton(result, base, out) and {result.dtype, out.dtype} <= set(TYPES) - {torch.uint8}:
            continued.append((result, base, out))
        elif not _on_cpu(result, base, out):
            out.copy_(result).sub_(base)
    if continued:
        from .residual_store_triton import launch

        launch(*zip(*continued, strict=True))


def _on_cpu(result: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> bool:
    """One residual, in one pass; False if there is no loop."""
    run = cpu.loop_over_rows("residual_store", (result, base), (out,))
    if run is None:
        return False
    run((result, base), out.data_ptr())
    return True


def difference(result: torch.Tensor, base: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The reference: the residual of one result, in `dtype`."""
    return result.to(dtype, copy=True) if base is None else result.to(dtype) - base
