"""`cfg_parallel` under diffusers' own pipelines: two ranks draw what one draws, be branches calls, a batch or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lib.families import FAMILIES
from lib.marks import only_in
from lib.ranks import close, on_ranks

from cachedit_fx import DBCacheConfig, enable_cache, summary

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

MASK = DBCacheConfig(1, steps_computation_mask=(1, 0, 1, 0, 0, 1), steps_computation_policy="static")
RUNS = [(0, 0), (0, 1), (1, 2)]
"""(resolution, seed) of each generation."""
CAPTURED = [name for name, family in FAMILIES.items() if family.blocks]
CALLS = [name for name in CAPTURED if FAMILIES[name].branches == 2]
HALVES = [name for name in CAPTURED if FAMILIES[name].branches == 1]


def generations(name, **ranks):
    """For each generation its latents. For each region cached steps by branch, calls left to others, uncached calls.

    Args:
        ranks: options of ranks.
    """
    family = FAMILIES[name]
    pipe = enable_cache(family.build(), MASK, inner_backend="eager", **ranks)
    found: list[Any] = []
    for size, seed in RUNS:
        latents = family.latents(pipe, size, seed)
        regions = [
            ([branch.cached_steps for branch in region.branches], sum(region.elsewhere.values()), region.uncached_calls)
            for region in summary(pipe)
        ]
        found.append((latents, regions))
    return found


def on_both(name):
    return on_ranks(lambda rank: generations(name, cfg_parallel=True), seconds=60)


@pytest.mark.budget(120, "three processes capture a pipeline's transformers at two resolutions")
@pytest.mark.parametrize("name", only_in("parallel", CALLS))
def test_two_calls(name):
    expected, both = generations(name), on_both(name)
    for number, (latents, regions) in enumerate(expected):
        assert all(torch.equal(found[number][0], latents) for found in both)
        for region, (cached, *_) in enumerate(regions):
            parts = [found[number][1][region] for found in both]
            assert not any(uncached for *_, uncached in parts)
            for branch, steps in enumerate(cached):
                own = [part[0][branch] if branch < len(part[0]) else [] for part in parts]
                assert own[branch] == steps
            if number == 1:  # the forms of all calls are known
                assert all(elsewhere == FAMILIES[name].steps[region] for _, elsewhere, _ in parts)


@pytest.mark.budget(120, "three processes capture a pipeline's transformers at two resolutions")
@pytest.mark.parametrize("name", only_in("parallel", HALVES))
def test_a_doubled_batch_or_none(name):
    expected, both = generations(name), on_both(name)
    for number, (latents, regions) in enumerate(expected):
        assert all(close(found[number][0], latents, 1e-4) for found in both)
        first, second = ([cached for cached, *_ in found[number][1]] for found in both)
        assert first == [cached for cached, *_ in regions]
        left = sum(elsewhere for _, elsewhere, _ in both[1][number][1])  # by the second rank, where one call is a step
        assert left or second == first
