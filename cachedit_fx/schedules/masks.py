"""Makes masks of the steps of a generation that compute, for `DBCacheConfig.steps_computation_mask`.

    bins  compute 4, 1, 1, 1, 1    cache 2, 5, 6, 7
    mask  1111 00 1 00000 1 000000 1 0000000 1          "ultra", 28 steps

An error early in a generation runs through all later steps. So every preset computes densely at first, and its gaps
(consecutive cached steps) grow towards the end. The last step computes. Four presets are known for 4, 6, 8, 9 and 28
steps; the other lengths follow from these:

    5, 7 steps     written by hand, between their neighbours
    10 to 27       the number of cached steps lies on the line between the 9- and the 28-step mask, rounded down; they
                   are shared among the 28-step mask's gaps in proportion, and computed steps among its compute bins
    from 29 on     bins grow one after another, first to last and round again, until there are enough steps
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cachedit_fx.config.rules import OptionError, Rule, check, choice, integer

_ANY = {4: "1101", 5: "11101", 6: "111001"}
_MASKS: dict[str, dict[int, str]] = {
    "slow": _ANY | {7: "1111101", 8: "11111011", 9: "111110111", 28: "1111111101110011100110010001"},
    "medium": _ANY | {7: "1110101", 8: "11110101", 9: "111110101", 28: "1111110110001100011000110001"},
    "fast": _ANY | {7: "1110101", 8: "11101001", 9: "111101001", 28: "1111110100010000100000100001"},
    "ultra": _ANY | {7: "1101001", 8: "11001001", 9: "111001001", 28: "1111001000001000000100000001"},
}
_SHORT, _FULL = 9, 28

_POLICY = choice(*_MASKS)
_STEPS = integer(1, "a number of steps")
_PRESET_STEPS = integer(min(_ANY), "a number of steps; fewer leave nothing to cache: pass no mask")
_BINS = Rule(
    lambda bins: isinstance(bins, (list, tuple)) and all(_STEPS.allows(steps) for steps in bins),
    "a list or tuple of integers >= 1 (numbers of steps)",
)


def steps_mask(
    mask_policy: str | None = None,
    total_steps: int | None = None,
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
) -> list[int]:
    """The mask of a preset or of bins: one digit for each step, 1 computes and 0 may reuse.

    Args:
        mask_policy: the preset: "slow", "medium", "fast" or "ultra", from most computed steps to fewest. None is
            "medium", unless there are bins.
        total_steps: denoising steps of a generation; at least 4 for a preset. With bins it may be left out.
        compute_bins: the number of steps of each compute bin. The mask begins with the first of them.
        cache_bins: the number of steps of each gap, alternating with `compute_bins`: as many, or one fewer.

    At any length a preset begins and ends with a computed step. "slow" computes at least as many steps as "medium",
    "medium" as "fast", "fast" as "ultra".

    Up to 28 steps, gaps do not shrink, except the last one. No gap is longer than the longest gap of 28 steps times
    `total_steps` / 28, rounded up, except in the mask of 6 steps. Neither holds beyond 28 steps, since bins grow one
    after another.

    Raises:
        OptionError: on an unknown preset, fewer than 4 steps, or a preset together with bins. Also on bins that do not
            fit together, or do not add up to `total_steps`.
    """
    if compute_bins is not None or cache_bins is not None:
        if mask_policy is not None:
            raise OptionError(
                f"mask_policy={mask_policy!r} and bins are two descriptions of one mask: leave out one of them"
            )
        return _from_bins(compute_bins, cache_bins, total_steps)
    preset = "medium" if mask_policy is None else mask_policy
    check("mask_policy", preset, _POLICY)
    if total_steps is None:
        raise OptionError("total_steps is missing: pass the number of denoising steps, or compute_bins and cache_bins")
    check("total_steps", total_steps, _PRESET_STEPS)
    return [int(digit) for digit in _preset(_MASKS[preset], int(total_steps))]


def _from_bins(
    compute_bins: Sequence[int] | None, cache_bins: Sequence[int] | None, total_steps: int | None
) -> list[int]:
    if compute_bins is None or cache_bins is None:
        missing = "compute_bins" if compute_bins is None else "cache_bins"
        raise OptionError(f"{missing} is missing: compute_bins and cache_bins make a mask together; pass both")
    check("compute_bins", compute_bins, _BINS)
    check("cache_bins", cache_bins, _BINS)
    if len(compute_bins) - len(cache_bins) not in (0, 1) or not compute_bins:
        raise OptionError(
            f"compute_bins has {len(compute_bins)} bins and cache_bins {len(cache_bins)}: they alternate, a compute "
            "bin first, so compute_bins must have as many as cache_bins or one more, and at least one"
        )
    mask = [int(digit) for digit in _join(compute_bins, cache_bins)]
    if total_steps is not None:
        check("total_steps", total_steps, _STEPS)
        if len(mask) != total_steps:
            raise OptionError(
                f"compute_bins and cache_bins add up to {len(mask)} steps but total_steps={total_steps}: "
                "they must agree; change one of them or leave total_steps=None"
            )
    return mask


def _preset(masks: dict[int, str], steps: int) -> str:
    if steps in masks:
        return masks[steps]
    if steps > _FULL:
        return _grown(masks[_FULL], steps)
    few, many = masks[_SHORT].count("0"), masks[_FULL].count("0")
    return _shrunk(masks[_FULL], steps, few + (many - few) * (steps - _SHORT) // (_FULL - _SHORT))


def _shrunk(mask: str, steps: int, cached: int) -> str:
    """The mask's shape in `steps` steps, `cached` of them in gaps. Each compute bin keeps at least one step."""
    lengths = _bins(mask)
    compute, gaps = lengths[::2], lengths[1::2]
    bins, shares = [compute[0]], []
    for share, successor in zip(_share(cached, gaps), compute[1:], strict=True):
        if share:
            bins.append(successor)
            shares.append(share)
        else:  # nothing is left of the gap: the bins on its two sides become one
            bins[-1] += successor
    spare = _share(steps - cached - len(bins), [count - 1 for count in bins])
    return _join([1 + share for share in spare], shares)


def _share(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to the weights, into whole numbers.

    Each share is rounded down; then the shares with the largest rests get one more, on a tie the later share first. So
    if the weights do not shrink, the shares do not shrink either.
    """
    shares = [total * weight // sum(weights) for weight in weights]
    rests = sorted(range(len(weights)), key=lambda index: (total * weights[index] % sum(weights), index), reverse=True)
    for index in rests[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _grown(mask: str, steps: int) -> str:
    """The mask with longer bins, `steps` steps in all.

    Bins grow one after another, by half of their own length times `steps` over the mask's length, at least by one
    step; the last bin by one step. The last gap and the last compute bin then lose the surplus alternately.
    """
    bins = _bins(mask)
    growth = [max(length * steps // (2 * len(mask)), 1) for length in bins[:-1]] + [1]
    for index in itertools.cycle(range(len(bins))):
        if sum(bins) >= steps:
            break
        bins[index] += growth[index]
    compute, gaps = bins[::2], bins[1::2]
    surplus = sum(bins) - steps
    for tail in itertools.islice(itertools.cycle((gaps, compute)), surplus):
        tail[-1] -= 1
        if not tail[-1]:
            tail.pop()
    return _join(compute, gaps)[:-1] + "1"


def _bins(mask: str) -> list[int]:
    """Lengths of the mask's bins: compute bins and gaps alternate."""
    return [len(list(digits)) for _, digits in itertools.groupby(mask)]


def _join(compute: Sequence[int], gaps: Sequence[int]) -> str:
    return "".join("1" * ones + "0" * zeros for ones, zeros in itertools.zip_longest(compute, gaps, fillvalue=0))
