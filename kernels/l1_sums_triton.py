"""The Triton kernels of `l1_sums`: partial sums of each tile, then their totals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton.language as tl

from .l1_sums import MAX_PREVIOUS
from .layout import NUM_WARPS, TILE, Layout, layout
from .layout_triton import device_of, elements_of_tile, jit
from .variants import TYPES, Variant

TOTAL_BLOCK, TOTAL_WARPS = 4096, 16


@jit
def _partial_sums(
    hidden_ptr,
    base_ptr,
    previous_ptrs,
    out_ptr,
    partial_ptr,
    n_rows,
    n_cols,
    hidden_sample_stride,
    hidden_row_stride,
    base_sample_stride,
    base_row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """r of one tile, and for each of `previous_ptrs` the tile's two sums, at [2k, program] and [2k + 1, program]."""
    program = tl.program_id(0)
    sample, rows, cols, mask = elements_of_tile(program, n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    at = sample * hidden_sample_stride + rows * hidden_row_stride + cols
    r = tl.load(hidden_ptr + at, mask, other=0.0).to(tl.float32)
    if base_ptr is not None:
        at = sample * base_sample_stride + rows * base_row_stride + cols
        r -= tl.load(base_ptr + at, mask, other=0.0).to(tl.float32)
    at = (sample * n_rows + rows) * n_cols + cols
    if out_ptr is not None:
        tl.store(out_ptr + at, r, mask)
    for k in tl.static_range(len(previous_ptrs)):
        previous = tl.load(previous_ptrs[k] + at, mask, other=0.0)
        row = partial_ptr + 2 * k * tl.num_programs(0) + program
        tl.store(row, tl.sum(tl.abs(previous - r)))
        tl.store(row + tl.num_programs(0), tl.sum(tl.abs(previous)))


@jit
def _total(partial_ptr, out_ptr, n_partials, BLOCK_SIZE: tl.constexpr):
    """Row program_id(1) of the partial sums, added up over the `n_partials` tiles of sample program_id(0)."""
    sample, row = tl.program_id(0), tl.program_id(1)
    partial_ptr += (row * tl.num_programs(0) + sample).to(tl.int64) * n_partials
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, n_partials, BLOCK_SIZE):
        at = start + tl.arange(0, BLOCK_SIZE)
        total += tl.load(partial_ptr + at, at < n_partials, other=0.0)
    tl.store(out_ptr + sample * tl.num_programs(1) + row, tl.sum(total))


def launch(
    hidden: torch.Tensor,
    base: torch.Tensor | None,
    previous: Sequence[torch.Tensor],
    out: torch.Tensor | None,
    per_sample: bool = False,
) -> torch.Tensor:
    """As `l1_sums`, by the kernels above: one launch for the pass, one for the totals.

    Raises:
        ValueError: with more than `MAX_PREVIOUS` residuals to compare with.
    """
    if len(previous) > MAX_PREVIOUS:
        raise ValueError(f"{len(previous)} residuals to compare with; one launch takes {MAX_PREVIOUS}")
    view = layout((hidden, base), per_sample)
    if view is None:
        hidden, base = hidden.contiguous(), None if base is None else base.contiguous()
        view = layout((hidden, base), per_sample)
    assert isinstance(view, Layout)
    groups = hidden.shape[0] if per_sample else 1
    sums = torch.empty((groups, len(previous), 2), dtype=torch.float32, device=hidden.device)
    if not hidden.numel():
        return (sums if per_sample else sums[0]).zero_()
    programs = view.samples * view.tiles
    partial = torch.empty((2 * len(previous), programs), dtype=torch.float32, device=hidden.device)
    with device_of(hidden):
        _partial_sums[(programs,)](
            hidden,
            base,
            tuple(previous),
            out,
            partial,
            view.rows,
            view.cols,
            *view.strides(hidden),
            *view.strides(base),
            *view.tile,
            num_warps=NUM_WARPS,
        )
        if previous:
            _total[(groups, 2 * len(previous))](partial, sums, programs // groups, TOTAL_BLOCK, num_warps=TOTAL_WARPS)
    return sums if per_sample else sums[0]


def variants() -> Iterator[Variant]:
    """Every specialisation that `launch` can choose."""
    strides = ("hidden_sample_stride", "hidden_row_stride", "base_sample_stride", "base_row_stride")
    choices = itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), range(MAX_PREVIOUS + 1), (True, False), (True, False), (1, 2)
    )
    for dtype, count, has_base, aligned, rows in choices:
        if not count and not has_base:
            continue
        pointer = f"*{TYPES[dtype]}"
        block_rows, block_cols = Layout(1, rows, 1).tile
        yield Variant(
            _partial_sums,
            f"l1_sums {TYPES[dtype]}, {count} previous{'' if has_base else ', no base'}, "
            f"{'row' if rows == 1 else 'rows'}{'' if aligned else ', unaligned'}",
            {
                "hidden_ptr": pointer,
                "base_ptr": pointer if has_base else None,
                "previous_ptrs": ("*fp32",) * count,
                "out_ptr": "*fp32" if has_base else None,
                "partial_ptr": "*fp32",
                "n_rows": "i32",
                "n_cols": "i32",
                **dict.fromkeys(strides, "i32"),
                "BLOCK_ROWS": "constexpr",
                "BLOCK_COLS": "constexpr",
            },
            {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols},
            read_bytes=TILE * (dtype.itemsize * (1 + has_base) + 4 * count),
            written_bytes=TILE * 4 * has_base,
            written_once=8 * count,
            aligned=aligned,
            multiples=frozenset({"n_cols", *strides}),
        )
    for aligned in (True, False):
        yield Variant(
            _total,
            f"l1_sums, total{'' if aligned else ', unaligned'}",
            {"partial_ptr": "*fp32", "out_ptr": "*fp32", "n_partials": "i32", "BLOCK_SIZE": "constexpr"},
            {"BLOCK_SIZE": TOTAL_BLOCK},
            read_bytes=4 * TOTAL_BLOCK,
            written_once=4,
            num_warps=TOTAL_WARPS,
            aligned=aligned,
            multiples=frozenset({"n_partials"}),
        )
