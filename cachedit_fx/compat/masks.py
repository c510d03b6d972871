"""Masks under cache-dit's arguments, and its very masks by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, zip_longest

import cachedit_fx
from cachedit_fx.config.rules import OptionError, check, choice

EXACT = "cache-dit/"
"""Before a policy's name: the mask that cache-dit 1.5.3 makes, bit for bit."""

_FIFTEEN = {
    "slow": "111101101101101",
    "medium": "111101101001001",
    "fast": "111010010010001",
    "ultra": "110100100010001",
}
"""Policy -> the mask of 15 steps that cache-dit's masks of 10 to 15 steps begin with."""


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    mask_policy: str | None = "medium",
) -> list[int]:
    """A mask of bins or of a policy: one digit for each step, 1 computes and 0 may reuse.

    Args:
        compute_bins: the number of steps of each compute bin; the mask begins with the first of them.
        cache_bins: the number of steps of each gap, alternating with `compute_bins`.
        total_steps: denoising steps. Bins that add up to more are cut off.
        mask_policy: "slow", "medium", "fast" or "ultra" of `cachedit_fx.steps_mask`, unless there are bins. With
            "cache-dit/" in front, such as "cache-dit/fast", the mask that cache-dit 1.5.3 makes.

    Raises:
        OptionError: on an unknown policy, a number of steps that it has no mask for, or bins that do not fit.
    """
    if compute_bins is not None or cache_bins is not None:
        mask = cachedit_fx.steps_mask(compute_bins=compute_bins, cache_bins=cache_bins)
        if total_steps is not None and len(mask) < total_steps:
            raise OptionError(
                f"compute_bins and cache_bins add up to {len(mask)} steps, fewer than total_steps={total_steps}"
            )
        return mask[:total_steps]
    if isinstance(mask_policy, str) and mask_policy.startswith(EXACT):
        return _exact(mask_policy.removeprefix(EXACT), total_steps)
    return cachedit_fx.steps_mask(mask_policy, total_steps)


def _exact(policy: str, steps: int | None) -> list[int]:
    """The mask of cache-dit 1.5.3.

    The mask of 10 to 27 steps is that of 15 or 28, shortened from its end: the last gap and the last compute bin lose a
    step alternately. All gaps may be gone before the bins, or the reverse. The last step computes. The other masks are
    those of `cachedit_fx.steps_mask`.
    """
    check("mask_policy", policy, choice(*_FIFTEEN))
    if steps in (5, 7):
        raise OptionError(f"total_steps={steps}: cache-dit has no mask for it; leave {EXACT!r} out")
    if steps is None or not 10 <= steps < 28:
        return cachedit_fx.steps_mask(policy, steps)
    whole = cachedit_fx.steps_mask(policy, 28) if steps > 15 else [int(digit) for digit in _FIFTEEN[policy]]
    lengths = [len(list(run)) for _, run in groupby(whole)]
    bins = [lengths[1::2], lengths[::2]]  # gaps, compute bins
    for turn in range(len(whole) - steps):
        shorter = bins[turn % 2]
        shorter[-1] -= 1
        if not shorter[-1]:
            shorter.pop()
    mask = [bit for zeros, ones in zip_longest(*bins, fillvalue=0) for bit in [1] * ones + [0] * zeros]
    return [*mask[:-1], 1]
