"""The Triton kernel of `residual_apply`: several results by one launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton.language as tl

from .layout import NUM_WARPS, TILE, Layout
from .layout_triton import device_of, elements_of_tile, jit, launch_groups
from .residual_apply import MAX_TERMS
from .variants import KEPT_DTYPES, TYPES, Variant


def max_results(terms: int) -> int:
    """Results that one launch writes: hidden states and text, as a rule. With many terms one, or registers spill."""
    return 2 if terms <= 4 else 1


@jit
def _apply_tile(
    out_ptr,
    base_ptr,
    stored_ptrs,
    weights,
    n_rows,
    n_cols,
    base_sample_stride,
    base_row_stride,
    tile,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    sample, rows, cols, mask = elements_of_tile(tile, n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    at = (sample * n_rows + rows) * n_cols + cols
    dtype: tl.constexpr = tl.float64 if stored_ptrs[0].dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype)
    if base_ptr is not None:
        total += tl.load(base_ptr + sample * base_sample_stride + rows * base_row_stride + cols, mask).to(dtype)
    for j in tl.static_range(len(stored_ptrs)):
        total += tl.load(stored_ptrs[j] + at, mask).to(dtype) * weights[j]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask)


@jit
def _apply(
    out_ptrs,
    base_ptrs,
    stored_ptrs,
    weights,
    starts,
    n_rows,
    n_cols,
    base_sample_strides,
    base_row_strides,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Programs from `starts[i]` on work on result i."""
    program = tl.program_id(0)
    for i in tl.static_range(len(out_ptrs)):
        if (program >= starts[i]) & (program < starts[i + 1]):
            _apply_tile(
                out_ptrs[i],
                base_ptrs[i],
                stored_ptrs[i],
                weights,
                n_rows[i],
                n_cols[i],
                base_sample_strides[i],
                base_row_strides[i],
                program - starts[i],
                BLOCK_ROWS,
                BLOCK_COLS,
            )


def launch(
    bases: Sequence[torch.Tensor | None],
    stored: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    outs: Sequence[torch.Tensor],
) -> None:
    """As `residual_apply`, by the kernel above. Results with equal dtypes and tiles share a launch, `max_results` at a
    time.

    Raises:
        ValueError: with more than `MAX_TERMS` residuals of a result.
    """
    if len(weights) > MAX_TERMS:
        raise ValueError(f"{len(weights)} residuals of each result; one launch adds up {MAX_TERMS}")
    for group in launch_groups(outs, [(base,) for base in bases], max_results(len(weights))):
        with device_of(outs[group.members[0]]):
            _apply[(group.starts[-1],)](
                tuple(outs[i] for i in group.members),
                tuple(base for (base,) in group.operands),
                tuple(tuple(stored[i]) for i in group.members),
                tuple(map(float, weights)),
                group.starts,
                *group.geometry,
                *group.tile,
                num_warps=NUM_WARPS,
            )


def variants() -> Iterator[Variant]:
    """Every specialisation that `launch` can choose."""
    looks = [(base, aligned, rows) for base, rows in ((True, 1), (True, 2), (False, 1)) for aligned in (True, False)]
    strides = ("base_sample_strides", "base_row_strides")
    counts = [(n, terms) for terms in range(1, MAX_TERMS + 1) for n in range(1, max_results(terms) + 1)]
    for (dtype, state), (results, terms), (has_base, aligned, rows) in itertools.product(KEPT_DTYPES, counts, looks):
        block_rows, block_cols = Layout(1, rows, 1).tile
        yield Variant(
            _apply,
            f"residual_apply {TYPES[dtype]}, {results} x {terms} {TYPES[state]}{'' if has_base else ', no base'}, "
            f"{'row' if rows == 1 else 'rows'}{'' if aligned else ', unaligned'}",
            {
                "out_ptrs": (f"*{TYPES[dtype]}",) * results,
                "base_ptrs": ((f"*{TYPES[dtype]}" if has_base else None),) * results,
                "stored_ptrs": ((f"*{TYPES[state]}",) * terms,) * results,
                "weights": ("fp32",) * terms,
                "starts": ("i32",) * (results + 1),
                **dict.fromkeys(("n_rows", "n_cols", *strides), ("i32",) * results),
                "BLOCK_ROWS": "constexpr",
                "BLOCK_COLS": "constexpr",
            },
            {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols},
            read_bytes=results * TILE * (dtype.itemsize * has_base + state.itemsize * terms),
            written_bytes=results * TILE * dtype.itemsize,
            aligned=aligned,
            multiples=frozenset({"n_cols", *strides}),
        )
