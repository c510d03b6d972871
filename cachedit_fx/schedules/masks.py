"""Masks that say which steps of a generation compute, for `DBCacheConfig.steps_computation_mask`.

    bins  compute 4, 1, 1, 1, 1    cache 2, 5, 6, 7
    mask  1111 00 1 00000 1 000000 1 0000000 1          "ultra", 28 steps

A wrong step early in a generation is carried through all that follow, so every preset computes densely first, and its
gaps (runs of cached steps) grow towards the end; the last step computes. Four policies are known for 4, 6, 8, 9 and 28
steps; the other lengths follow from them:

    5, 7 steps     written down by hand, between their neighbours
    10 to 27       the number of cached steps lies on the line between the 9- and the 28-step mask, rounded down; they
                   are shared among the 28-step mask's gaps in proportion, and computed steps among its compute bins
    from 29 on     bins grow in turn, from the first to the last and round again, until there are enough steps
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
    """The mask of a preset, or of bins of your own: one digit for each step, 1 computes and 0 may reuse.

    Args:
        mask_policy: the preset: "slow", "medium", "fast" or "ultra", from most computed steps to fewest. None is
            "medium", unless bins are given.
        total_steps: denoising steps of a generation; at least 4 for a preset. With bins it may be left out.
        compute_bins: steps of each run of computed steps; the mask begins with the first of them.
        cache_bins: steps of each run that may be cached, in turn with `compute_bins`: as many, or one fewer.

    At any length a preset begins and ends with a computed step, and "slow" computes at least as many steps as "medium",
    "medium" as "fast", "fast" as "ultra". Up to 28 steps gaps do not shrink (the last one excepted), and none is longer
    than the longest of 28 steps times `total_steps` / 28, rounded up (the mask of 6 steps excepted); beyond, neither
    holds, since bins grow in turn.

    Raises:
        OptionError: for an unknown policy, fewer than 4 steps, bins that do not fit together or do not add up to
            `total_steps`, and a policy along with bins.
    """
    if compute_bins is not None or cache_bins is not None:
        if mask_policy is not None:
            raise OptionError(
                f"mask_policy={mask_policy!r} and bins are two descriptions of one mask: leave out one of them"
            )
        return _from_bins(compute_bins, cache_bins, total_steps)
    policy = "medium" if mask_policy is None else mask_policy
    check("mask_policy", policy, _POLICY)
    if total_steps is None:
        raise OptionError("total_steps is missing: pass the number of denoising steps, or compute_bins and cache_bins")
    check("total_steps", total_steps, _PRESET_STEPS)
    return [int(digit) for digit in _preset(_MASKS[policy], int(total_steps))]


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
    """The mask's shape in `steps` steps, `cached` of them in gaps. Each compute bin keeps one step at least."""
    runs = _runs(mask)
    compute, gaps = runs[::2], runs[1::2]
    computed, shares = [compute[0]], []
    for share, following in zip(_share(cached, gaps), compute[1:], strict=True):
        if share:
            computed.append(following)
            shares.append(share)
        else:  # nothing is left of the gap: the bins on its two sides are one
            computed[-1] += following
    spare = _share(steps - cached - len(computed), [count - 1 for count in computed])
    return _join([1 + share for share in spare], shares)


def _share(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to the weights: whole parts first, then one each to the largest rests, later ones
    first where they are equal. So the shares of weights that do not shrink do not shrink either."""
    shares = [total * weight // sum(weights) for weight in weights]
    rests = sorted(range(len(weights)), key=lambda index: (total * weights[index] % sum(weights), index), reverse=True)
    for index in rests[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _grown(mask: str, steps: int) -> str:
    """The mask's runs of digits made longer in turn, by half of their own length times `steps` over the mask's length,
    one step at least, and the last one by one step. What is too much is taken off the last cache bin and the last
    compute bin in turn."""
    runs = _runs(mask)
    growth = [max(run * steps // (2 * len(mask)), 1) for run in runs[:-1]] + [1]
    for index in itertools.cycle(range(len(runs))):
        if sum(runs) >= steps:
            break
        runs[index] += growth[index]
    compute, cache = runs[::2], runs[1::2]
    surplus = sum(runs) - steps
    for tail in itertools.islice(itertools.cycle((cache, compute)), surplus):
        tail[-1] -= 1
        if not tail[-1]:
            tail.pop()
    return _join(compute, cache)[:-1] + "1"


def _runs(mask: str) -> list[int]:
    """Lengths of the runs of equal digits: compute bins and cache bins in turn."""
    return [len(list(run)) for _, run in itertools.groupby(mask)]


def _join(compute: Sequence[int], cache: Sequence[int]) -> str:
    return "".join("1" * ones + "0" * zeros for ones, zeros in itertools.zip_longest(compute, cache, fillvalue=0))
