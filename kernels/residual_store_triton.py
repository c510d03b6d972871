"""The Triton kernel of `residual_store`: several residuals by one launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton.language as tl

from .layout import NUM_WARPS, TILE, Layout
from .layout_triton import device_of, elements_of_tile, jit, launch_groups
from .variants import KEPT_DTYPES, TYPES, Variant

MAX_RESULTS = 2
"""Results that one launch stores."""


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
    """As `residual_store`, by the kernel above: results with equal dtypes and tiles share a launch, `MAX_RESULTS` at a
    time."""
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
