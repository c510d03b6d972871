"""Masks under cache-dit's arguments."""

import pytest

import cachedit_fx
import cachedit_fx.compat as cache_dit
from cachedit_fx import OptionError


def digits(mask):
    return "".join(map(str, mask))


@pytest.mark.parametrize("policy", ["slow", "medium", "fast", "ultra"])
@pytest.mark.parametrize("steps", [4, 9, 20, 28, 50])
def test_policies_are_ours(policy, steps):
    mask = cache_dit.steps_mask(total_steps=steps, mask_policy=policy)
    assert mask == cachedit_fx.steps_mask(policy, steps)


@pytest.mark.parametrize(
    ("policy", "steps", "mask"),
    [
        ("ultra", 16, "1100000000000001"),
        ("fast", 20, "11111101000000000001"),
        ("slow", 12, "111101101111"),
        ("medium", 10, "1111011011"),
        ("fast", 28, "1111110100010000100000100001"),
    ],
)
def test_masks_of_cache_dit_by_name(policy, steps, mask):
    assert digits(cache_dit.steps_mask(total_steps=steps, mask_policy=f"cache-dit/{policy}")) == mask


def test_bins_are_cut_off():
    assert digits(cache_dit.steps_mask([6, 1, 1], [1, 2, 5])) == "1111110100100000"
    assert digits(cache_dit.steps_mask([6, 1, 1], [1, 2, 5], total_steps=13)) == "1111110100100"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compute_bins": [2], "cache_bins": [1], "total_steps": 9}, "add up to 3 steps, fewer than total_steps=9"),
        ({"compute_bins": [2]}, "cache_bins is missing"),
        ({"total_steps": 28, "mask_policy": "fest"}, "did you mean 'fast'"),
        ({"total_steps": 28, "mask_policy": "cache-dit/fest"}, "did you mean 'fast'"),
        ({"total_steps": 7, "mask_policy": "cache-dit/fast"}, "cache-dit has no mask for it"),
        ({}, "total_steps is missing"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(OptionError) as error:
        cache_dit.steps_mask(**arguments)
    assert words in str(error.value)
