"""The difference of two residuals, from their sums."""

import math

import pytest
import torch

from cachedit_fx.kernels.l1_sums import absolute_sums
from cachedit_fx.runtime.guard import EPSILON, Residual, read_back, relative_difference


def test_the_bits_are_those_of_float32():
    """Sums of either precision: rounded, added and divided as float32 tensors are."""
    exponents = torch.linspace(-40, 36, 1000, dtype=torch.float64)
    changes, sizes = (10 ** exponents[torch.randperm(1000)] * (1 + torch.rand(1000).double()) for _ in range(2))
    expected = changes.float() / (sizes.float() + EPSILON)
    for kind in (torch.float64, torch.float32):
        pairs = zip(changes.to(kind).tolist(), sizes.to(kind).tolist(), strict=True)
        assert [relative_difference(*pair) for pair in pairs] == expected.tolist()


@pytest.mark.parametrize(
    ("change", "size", "expected"),
    [(0.0, 0.0, 0.0), (0.0, 5.0, 0.0), (5.0, 5.0, 1.0), (15.0, 5.0, 3.0), (1.0, 3.0, 0.3333333432674408)],
)
def test_differences_of_numbers(change, size, expected):
    assert relative_difference(change, size) == expected


def test_change_from_zero_is_a_large_difference_not_a_small_one():
    assert relative_difference(4e-3, 0.0) > 1e6
    assert relative_difference(1e30, 0.0) == math.inf


@pytest.mark.parametrize(("change", "size"), [(math.nan, 1), (math.nan, math.inf), (math.inf, math.inf), (math.inf, 1)])
def test_a_change_that_is_not_finite_has_no_finite_difference(change, size):
    assert not math.isfinite(relative_difference(change, size))


def test_the_sums_of_parts_add_up_to_those_of_the_whole():
    """As ranks do that hold a part of the hidden states each."""
    hidden, base, previous = torch.randn(3, 2, 64, 8)
    whole = Residual(hidden, base, None).sums([previous])
    parts = [
        Residual(h, b, None).sums([p.contiguous()])
        for h, b, p in zip(hidden.chunk(4, 1), base.chunk(4, 1), previous.chunk(4, 1), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert relative_difference(*read_back([whole])) == relative_difference(
        *absolute_sums(previous, hidden - base).tolist()
    )
