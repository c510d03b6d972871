"""Bypassing a region: the values that run through it, and what it is predicted to add to them.

    result = base + sum_j c_j residual_j

One residual of weight 1 repeats the latest computed step; more of them, with a calibrator's weights, predict. One pass
whatever the number of residuals: reads the base and each residual, writes the result. All results of a region are
written by one launch; a program finds its result by its number.

Summed in float32, in float64 where a residual is float64; the weights are float32. One residual of weight 1 gives
back, to the bit, the result that `residual_store` took it from.
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

MAX_TERMS = 6
"""Residuals of each result that one launch adds up: those of the fifth order."""


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
    """As `residual_apply`, by the kernel above: results that are seen alike share a launch, `max_results` at a time.

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
    """The reference: base + sum_j weights[j] * residuals[j], in float32 where the residuals are of 16 bits, else in
    their own precision."""
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
