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
from collections.abc import Sequence

import torch

from . import cpu
from .layout import runs_on_triton

MAX_PREVIOUS = 2
"""Residuals that one launch compares with."""


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
        first. float64 from the loop for CPUs, which adds the sums of tiles in it, otherwise float32. Not finite if an
        input is not.

    Raises:
        ValueError: if only one of `base` and `out` is given, or `previous` has too many members.
    """
    if (base is None) is not (out is None):
        raise ValueError("l1_sums: out goes with base, since without a base r is hidden itself")
    if runs_on_triton(hidden, base, *previous, out) and hidden.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from .l1_sums_triton import launch

        return launch(hidden, base, previous, out, per_sample)
    samples = hidden.shape[0] if per_sample else 1
    run = cpu.loop_over_rows("l1_sums", (hidden, base), (*previous, out), per_sample)
    if run is not None:
        sums = torch.empty((samples, len(previous), 2), dtype=torch.float64)
        written = None if out is None else out.data_ptr()
        run((hidden, base), cpu.pointers(previous), len(previous), written, sums.data_ptr(), samples)
    else:
        r = residual(hidden, base)
        if out is not None:
            out.copy_(r)
        if not per_sample:
            r, previous = r[None], [before[None] for before in previous]
        sums = r.new_empty((samples, len(previous), 2))
        for i, k in itertools.product(range(samples), range(len(previous))):
            sums[i, k] = absolute_sums(previous[k][i], r[i])
    return sums if per_sample else sums[0]


def residual(hidden: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """The reference: r = hidden - base in float32, shape of `hidden`; `hidden` in float32 if there is no base."""
    hidden = hidden.detach().to(torch.float32)
    return hidden if base is None else hidden - base.detach()


def absolute_sums(previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """The reference: sum|previous - current| and sum|previous|, [2]. Inputs: float32, one shape."""
    return torch.stack([(previous - current).abs().sum(), previous.abs().sum()])
