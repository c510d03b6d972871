"""Masks of computed steps: the known ones digit by digit, what holds at every length, bins, errors, a run."""

import inspect
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lib.toys import denoise, make

import cachedit_fx
from cachedit_fx import DBCacheConfig, OptionError, enable_cache, steps_mask, summary

POLICIES = ("slow", "medium", "fast", "ultra")
KNOWN = {
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
    9: ("111110111", "111110101", "111101001", "111001001"),
    8: ("11111011", "11110101", "11101001", "11001001"),
    7: ("1111101", "1110101", "1110101", "1101001"),
    6: ("111001",) * 4,
    5: ("11101",) * 4,
    4: ("1101",) * 4,
}
BEYOND = {  # cache-dit 1.5.3
    29: (
        "11111111111101110011100110011",
        "11111111101100011000110001101",
        "11111111101000100001000001001",
        "11111100100000100000010000001",
    ),
    36: (
        "111111111111100111100011100110010001",
        "111111111001110000111000011000110001",
        "111111111001100001100000010000010001",
        "111111000110000000011000000100000001",
    ),
    50: (
        "11111111111111111111110011111000111110001110001101",
        "11111111111111110011100000111000001110000011100001",
        "11111111111001100000110000000110000000001100000001",
        "11111110001100000000011000000000001100000000000001",
    ),
    56: (
        "11111111111111110011111100001111110000111100001100000011",
        "11111111111100111100000011110000001111000000111100000011",
        "11111111111100110000001100000000110000000000110000000011",
        "11111111000011000000000011000000000000110000000000000011",
    ),
}


def digits(mask: list[int]) -> str:
    assert all(type(bit) is int for bit in mask)
    return "".join(map(str, mask))


def gaps(mask: list[int]) -> list[int]:
    return [len(list(run)) for bit, run in itertools.groupby(mask) if not bit]


@pytest.mark.parametrize(("steps", "masks"), [*KNOWN.items(), *BEYOND.items()])
def test_the_known_masks(steps, masks):
    assert tuple(digits(steps_mask(policy, steps)) for policy in POLICIES) == masks


def test_computed_steps_of_fifty():
    assert [sum(steps_mask(policy, 50)) for policy in POLICIES] == [38, 29, 20, 14]


def test_a_length_between():
    """20 steps: the known masks' shape, and a number of cached steps between those of 9 and of 28."""
    assert [digits(steps_mask(policy, 20)) for policy in POLICIES] == [
        "11111101101101101001",
        "11111100100110011001",
        "11110100100100010001",
        "11101000100001000001",
    ]


def test_the_mask_without_a_policy_is_medium():
    assert steps_mask(total_steps=28) == steps_mask("medium", 28)


# ---------------------------------------------------------------------------------------------------------------------
# what holds at every length


def presets(first: int, last: int) -> list[tuple[str, int]]:
    return list(itertools.product(POLICIES, range(first, last + 1)))


def test_length_and_ends():
    for policy, steps in presets(4, 200):
        mask = steps_mask(policy, steps)
        assert len(mask) == steps and set(mask) == {0, 1}
        assert mask[:2] == [1, 1] and mask[-1] == 1


def test_a_slower_policy_computes_at_least_as_many_steps():
    for steps in range(4, 201):
        computed = [sum(steps_mask(policy, steps)) for policy in POLICIES]
        assert computed == sorted(computed, reverse=True)


def test_gaps_keep_their_shape():
    for policy, steps in presets(4, 28):
        found, full = gaps(steps_mask(policy, steps)), gaps(steps_mask(policy, 28))
        assert found[:-1] == sorted(found[:-1]) and len(found) <= len(full)
        assert steps == 6 or max(found) <= math.ceil(max(full) * steps / 28)


def test_more_steps_mean_no_fewer_computed_and_no_fewer_cached():
    for policy, steps in presets(8, 27):
        shorter, longer = steps_mask(policy, steps), steps_mask(policy, steps + 1)
        assert sum(shorter) <= sum(longer)
        assert shorter.count(0) <= longer.count(0)


# ---------------------------------------------------------------------------------------------------------------------
# bins


@pytest.mark.parametrize(
    ("compute", "cache", "expected"),
    [
        ([6, 1, 1], [1, 2], "11111101001"),
        ([6, 1, 1], (1, 2, 3), "11111101001000"),  # ends with a cache bin
        ([4], [], "1111"),
        ([1], [3], "1000"),
    ],
)
def test_bins_are_taken_in_turn(compute, cache, expected):
    assert digits(steps_mask(compute_bins=compute, cache_bins=cache)) == expected
    assert digits(steps_mask(compute_bins=compute, cache_bins=cache, total_steps=len(expected))) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=8), st.booleans())
def test_bins_come_back_from_the_mask(compute, cache, open_ended):
    cache = cache[: len(compute) - (not open_ended)]
    mask = steps_mask(compute_bins=compute, cache_bins=cache)
    assert gaps(mask) == cache and gaps([1 - bit for bit in mask]) == compute


# ---------------------------------------------------------------------------------------------------------------------
# errors

BINS = {"compute_bins": [2, 1], "cache_bins": [1]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_policy": "fst", "total_steps": 28}, ["mask_policy='fst'", "'slow'", "'ultra'", "mean 'fast'"]),
        ({"mask_policy": 3, "total_steps": 28}, ["mask_policy=3", "'medium'"]),
        ({"mask_policy": "fast"}, ["total_steps is missing"]),
        ({}, ["total_steps is missing", "compute_bins"]),
        ({"mask_policy": "fast", "total_steps": 3}, ["total_steps=3", ">= 4", "pass no mask"]),
        ({"mask_policy": "fast", "total_steps": 28.0}, ["total_steps=28.0", "an integer"]),
        ({"mask_policy": "fast", "total_steps": True}, ["total_steps=True", "an integer"]),
        (BINS | {"mask_policy": "fast"}, ["mask_policy='fast'", "leave out one"]),
        ({"compute_bins": [2, 1]}, ["cache_bins is missing"]),
        ({"cache_bins": [2, 1], "total_steps": 28}, ["compute_bins is missing"]),
        (BINS | {"compute_bins": [2, 0]}, ["compute_bins=[2, 0]", ">= 1"]),
        (BINS | {"cache_bins": [-1]}, ["cache_bins=[-1]", ">= 1"]),
        (BINS | {"cache_bins": [1.0]}, ["cache_bins=[1.0]", "integers"]),
        (BINS | {"compute_bins": "21"}, ["compute_bins='21'", "list"]),
        (BINS | {"compute_bins": [2, 1, 1]}, ["3 bins", "cache_bins 1", "alternate"]),
        (BINS | {"compute_bins": [4], "cache_bins": [1, 1]}, ["1 bins", "cache_bins 2", "alternate"]),
        ({"compute_bins": [], "cache_bins": []}, ["at least one"]),
        (BINS | {"total_steps": 5}, ["add up to 4", "total_steps=5", "must agree"]),
        (BINS | {"total_steps": 3}, ["add up to 4", "total_steps=3", "must agree"]),
        (BINS | {"total_steps": 0}, ["total_steps=0", ">= 1"]),
    ],
    ids=str,
)
def test_errors_say_what_is_allowed(arguments: dict[str, Any], words: list[str]):
    with pytest.raises(OptionError) as error:
        steps_mask(**arguments)
    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# in use


def test_static_and_dynamic_masks_end_to_end():
    mask = steps_mask("fast", 10)
    zeros = [step for step, bit in enumerate(mask) if not bit]
    base = DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=mask, residual_diff_threshold=0.04)
    model = make()

    def run(config):
        enable_cache(model, config, inner_backend="eager")
        denoise(model)
        return summary(model)[0]

    static = run(base.reset(steps_computation_policy="static"))
    assert static.cached_steps == zeros and static.residual_diffs == {}
    dynamic = run(base)
    assert list(dynamic.residual_diffs) == zeros
    assert dynamic.cached_steps == [step for step in zeros if dynamic.residual_diffs[step] < 0.04]
    assert 0 < len(dynamic.cached_steps) < len(zeros)


def test_the_guide_shows_what_runs():
    guide = Path(inspect.getfile(cachedit_fx)).parents[1].joinpath("docs/guide.md")
    if not guide.exists():
        pytest.skip("installed without its documents")
    lines = [line for line in guide.read_text().splitlines() if "cachedit_fx.steps_mask(" in line]
    assert len(lines) == 2
    for line in lines:
        names: dict[str, Any] = {"cachedit_fx": cachedit_fx, "DBCacheConfig": DBCacheConfig}
        exec(line, names)
        for shown in re.findall(r"# ([01]+)$", line):
            assert digits(names["mask"]) == shown
