"""Sums over the difference between what the first blocks add to the hidden states now and what they added before.

    r = H_F - H_in                      sums = (sum|r_prev - r|, sum|r_prev|)

Their quotient is the relative L1 difference (`runtime.guard`). Sums, unlike quotients, can be added over the ranks that
hold parts of the hidden states.

One pass: reads H_F, H_in and r_prev, writes r, and sums in float32 whatever the model's dtype. With bfloat16 sums, as
elsewhere in use, neighbouring steps become equal. Two stages, each in a fixed order, give identical sums for identical
inputs: partial sums of each tile, then their total. One pass compares several r_prev (the CFG branches that a call may
turn out to be).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from . import cpu
from .layout import NUM_WARPS, TILE, Layout, device_of, elements_of_tile, jit, layout, runs_on_triton, tl
from .variants import TYPES, Variant

MAX_PREVIOUS = 2
"""Residuals that one launch compares with."""
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
    seen = layout((hidden, base), per_sample)
    if seen is None:
        hidden, base = hidden.contiguous(), None if base is None else base.contiguous()
        seen = layout((hidden, base), per_sample)
    assert isinstance(seen, Layout)
    groups = hidden.shape[0] if per_sample else 1
    sums = torch.empty((groups, len(previous), 2), dtype=torch.float32, device=hidden.device)
    if not hidden.numel():
        return (sums if per_sample else sums[0]).zero_()
    programs = seen.samples * seen.tiles
    partial = torch.empty((2 * len(previous), programs), dtype=torch.float32, device=hidden.device)
    with device_of(hidden):
        _partial_sums[(programs,)](
            hidden,
            base,
            tuple(previous),
            out,
            partial,
            seen.rows,
            seen.cols,
            *seen.strides(hidden),
            *seen.strides(base),
            *seen.tile,
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


def l1_sums(
    hidden: torch.Tensor,
    base: torch.Tensor | None,
    previous: Sequence[torch.Tensor],
    out: torch.Tensor | None,
    per_sample: bool = False,
) -> torch.Tensor:
    """Write r = hidden - base to `out`, and return sum|r_prev - r| and sum|r_prev| for each r_prev of `previous`.

    Args:
        hidden, base: one shape and dtype, any strides. Without a base r is `hidden` itself, and nothing is written.
        previous: earlier r, at most `MAX_PREVIOUS`, of the same shape; float32, contiguous.
        out: r in float32, contiguous, and none of `previous`; None if and only if there is no base.
        per_sample: sum over each index of the first dimension separately.

    Returns:
        [len(previous), 2] or, per sample, [samples, len(previous), 2], on the inputs' device: the sum of the change
        first. float64 from the loop for CPUs, float32 otherwise. Not finite if an input is not.

    Raises:
        ValueError: if only one of `base` and `out` is given, or `previous` has too many members.
    """
    if (base is None) is not (out is None):
        raise ValueError("l1_sums: out goes with base, since without a base r is hidden itself")
    if runs_on_triton(hidden, base, *previous, out) and hidden.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return launch(hidden, base, previous, out, per_sample)
    sums = _on_cpu(hidden, base, previous, out, per_sample)
    if sums is not None:
        return sums
    r = residual(hidden, base)
    if out is not None:
        out.copy_(r)
    if not per_sample:
        r, previous = r[None], [before[None] for before in previous]
    sums = r.new_empty((r.shape[0], len(previous), 2))
    for i, k in itertools.product(range(r.shape[0]), range(len(previous))):
        sums[i, k] = absolute_sums(previous[k][i], r[i])
    return sums if per_sample else sums[0]


def _on_cpu(
    hidden: torch.Tensor,
    base: torch.Tensor | None,
    previous: Sequence[torch.Tensor],
    out: torch.Tensor | None,
    per_sample: bool,
) -> torch.Tensor | None:
    """As `l1_sums`, in one pass; None if there is no loop. Sums of tiles are added in float64."""
    run = cpu.loop_over_rows("l1_sums", (hidden, base), (*previous, out), per_sample)
    if run is None:
        return None
    groups = hidden.shape[0] if per_sample else 1
    sums = torch.empty((groups, len(previous), 2), dtype=torch.float64)
    written = None if out is None else out.data_ptr()
    run((hidden, base), cpu.pointers(previous), len(previous), written, sums.data_ptr(), groups)
    return sums if per_sample else sums[0]


def residual(hidden: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """The reference: r = hidden - base in float32, shape of `hidden`; `hidden` in float32 where there is no base."""
    hidden = hidden.detach().to(torch.float32)
    return hidden if base is None else hidden - base.detach()


def absolute_sums(previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """The reference: sum|previous - current| and sum|previous|, [2]. Inputs: float32, one shape."""
    return torch.stack([(previous - current).abs().sum(), previous.abs().sum()])
