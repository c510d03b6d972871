"""Storing what a region adds to the values that run through it, at a step that computes it.

    residual = result - base

One pass: reads result and base, writes the residual; all results of a region by one launch. This is the whole update of
the state for every calibrator: a predictor that is linear in the values of computed steps (Taylor of any order, FoCa,
Lagrange) keeps the values, and its derivatives are weights (`runtime.calibrators`). A step writes one buffer, where
updating n derivatives in place would read n + 1 and write as many.

Residuals are kept one precision up (float32 for 16-bit values, float64 for float32 ones): base + (result - base) in the
values' own precision is not `result`, and reuse on identical inputs must reproduce it to the bit. It does while the
result is not smaller than its base by a factor of 2^12 (float16), 2^15 (bfloat16) or 2^28 (float32); beyond, the error
is a rounding of the base.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from . import cpu
from .layout import (
    NUM_WARPS,
    TILE,
    Layout,
    device_of,
    elements_of_tile,
    jit,
    launch_groups,
    runs_on_triton,
    tl,
)
from .variants import KEPT_DTYPES, TYPES, Variant

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
MAX_RESULTS = 2
"""Results that one launch stores."""


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


@jit
def _store_tile(
    out_ptr,
    result_ptr,
    base_ptr,
    n_rows,
    n_cols,
    result_sample_stride,
    result_row_stride,
    base_sample_stride,
    base_row_stride,
    tile,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    sample, rows, cols, mask = elements_of_tile(tile, n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    dtype: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    result = tl.load(result_ptr + sample * result_sample_stride + rows * result_row_stride + cols, mask).to(dtype)
    base = tl.load(base_ptr + sample * base_sample_stride + rows * base_row_stride + cols, mask).to(dtype)
    at = (sample * n_rows + rows) * n_cols + cols
    tl.store(out_ptr + at, (result - base).to(out_ptr.dtype.element_ty), mask)


@jit
def _store(
    out_ptrs,
    result_ptrs,
    base_ptrs,
    starts,
    n_rows,
    n_cols,
    result_sample_strides,
    result_row_strides,
    base_sample_strides,
    base_row_strides,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Programs from `starts[i]` on work on result i."""
    program = tl.program_id(0)
    for i in tl.static_range(len(out_ptrs)):
        if (program >= starts[i]) & (program < starts[i + 1]):
            _store_tile(
                out_ptrs[i],
                result_ptrs[i],
                base_ptrs[i],
                n_rows[i],
                n_cols[i],
                result_sample_strides[i],
                result_row_strides[i],
                base_sample_strides[i],
                base_row_strides[i],
                program - starts[i],
                BLOCK_ROWS,
                BLOCK_COLS,
            )


def launch(results: Sequence[torch.Tensor], bases: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """As `residual_store`, by the kernel above: results that are seen alike share a launch, `MAX_RESULTS` at a time."""
    for group in launch_groups(outs, list(zip(results, bases, strict=True)), MAX_RESULTS):
        result_ptrs, base_ptrs = zip(*group.operands, strict=True)
        with device_of(outs[group.members[0]]):
            _store[(group.starts[-1],)](
                tuple(outs[i] for i in group.members),
                result_ptrs,
                base_ptrs,
                group.starts,
                *group.geometry,
                *group.tile,
                num_warps=NUM_WARPS,
            )


def variants() -> Iterator[Variant]:
    """Every specialisation that `launch` can choose."""
    strides = ("result_sample_strides", "result_row_strides", "base_sample_strides", "base_row_strides")
    for (dtype, state), results, aligned, rows in itertools.product(
        KEPT_DTYPES, range(1, MAX_RESULTS + 1), (True, False), (1, 2)
    ):
        block_rows, block_cols = Layout(1, rows, 1).tile
        yield Variant(
            _store,
            f"residual_store {TYPES[dtype]}, {results} x {TYPES[state]}, "
            f"{'row' if rows == 1 else 'rows'}{'' if aligned else ', unaligned'}",
            {
                "out_ptrs": (f"*{TYPES[state]}",) * results,
                "result_ptrs": (f"*{TYPES[dtype]}",) * results,
                "base_ptrs": (f"*{TYPES[dtype]}",) * results,
                "starts": ("i32",) * (results + 1),
                **dict.fromkeys(("n_rows", "n_cols", *strides), ("i32",) * results),
                "BLOCK_ROWS": "constexpr",
                "BLOCK_COLS": "constexpr",
            },
            {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols},
            read_bytes=results * TILE * 2 * dtype.itemsize,
            written_bytes=results * TILE * state.itemsize,
            aligned=aligned,
            multiples=frozenset({"n_cols", *strides}),
        )


def residual_store(
    results: Sequence[torch.Tensor], bases: Sequence[torch.Tensor | None], outs: Sequence[torch.Tensor]
) -> None:
    """Write result - base to each of `outs`, the result itself where there is no base.

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
