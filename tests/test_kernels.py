"""Kernels against float64, and the promise that what was stored comes back to the bit."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cachedit_fx.kernels.l1_diff import l1_difference, residual
from cachedit_fx.kernels.residual_apply import apply_residual, residual_dtype, residual_like, store_residual

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (1, 1, 1), (2, 7, 5), (1, 33, 129))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_difference_agrees_with_float64(shape, dtype):
    """Inputs in 16 bits are taken as they are: no sum is rounded to their precision."""
    hidden, before, base = (torch.randn(shape).to(dtype) for _ in range(3))
    previous, current = residual(before, base), residual(hidden, base)
    assert previous.dtype is current.dtype is torch.float32
    r_previous = (before.double() - base.double()).float().double()
    r_current = (hidden.double() - base.double()).float().double()
    expected = (r_previous - r_current).abs().sum() / r_previous.abs().sum()
    found = l1_difference(previous, current)
    assert found.dtype is torch.float32 and found.shape == ()
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-5)


def test_neighbouring_bfloat16_steps_do_not_become_equal():
    """Two residuals that differ in one element of many: a bfloat16 mean would lose it."""
    before = torch.ones(1, 64, 64, dtype=torch.bfloat16)
    now = before.clone()
    now[0, 0, 0] = 2
    found = l1_difference(residual(before, torch.zeros_like(before)), residual(now, torch.zeros_like(now)))
    assert math.isclose(found.item(), 1 / 4096, rel_tol=1e-6)


def test_residual_without_reference_is_the_value_itself_in_float32():
    hidden = torch.randn(3, dtype=torch.bfloat16)
    assert torch.equal(residual(hidden, None), hidden.float())


@pytest.mark.parametrize(
    ("previous", "current", "expected"),
    [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (1.0, 4.0, 3.0), (-1.0, 1.0, 2.0)],
)
def test_difference_of_constants(previous, current, expected):
    assert l1_difference(torch.full((5,), previous), torch.full((5,), current)).item() == expected


@pytest.mark.parametrize(("previous", "current"), [(math.nan, 1), (1, math.nan), (math.inf, math.inf), (1, math.inf)])
def test_difference_is_not_finite_where_an_input_is_not(previous, current):
    first, second = torch.ones(4), torch.ones(4)
    first[2], second[2] = previous, current
    assert not math.isfinite(l1_difference(first, second).item())


def test_change_from_zero_is_a_large_difference_not_a_small_one():
    assert l1_difference(torch.zeros(4), torch.full((4,), 1e-3)).item() > 1e6


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ],
)
def test_residuals_are_kept_one_precision_up(dtype, wider):
    value = torch.zeros(2, 3, dtype=dtype)
    assert residual_dtype(value) is wider
    assert residual_like(value).dtype is wider


def restored(result, base):
    out = residual_like(result)
    store_residual(result, base, out)
    return apply_residual(base, [out], [1.0], result.dtype)


# Bits that the wider dtype has to spare over the two operands' own: how far below the base a result may lie.
SPARE = {torch.float32: 53 - 24 - 1, torch.bfloat16: 24 - 8 - 1, torch.float16: 24 - 11 - 1}


def arrays(limit):
    return hnp.arrays("float32", 16, elements=st.floats(-limit, limit, width=32, allow_subnormal=False))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_what_was_stored_comes_back_to_the_bit(dtype, data):
    """For any two values, unless the result lies below the base by more bits than the wider dtype has to spare."""
    limit = 2.0**15 if dtype is torch.float16 else 2.0**100
    base, result = (torch.from_numpy(data.draw(arrays(limit))).to(dtype) for _ in range(2))
    small = (result != 0) & (result.double().abs() < base.double().abs() * 2.0 ** -SPARE[dtype])
    result = torch.where(small, base, result)
    assert torch.equal(restored(result, base), result)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_beyond_that_the_error_is_a_rounding_of_the_base(dtype, data):
    base = data.draw(st.floats(1, 2.0**15))
    ratio = data.draw(st.integers(SPARE[dtype] + 1, 60))
    base, result = torch.tensor([base], dtype=dtype), torch.tensor([base * 2.0**-ratio * 1.1], dtype=dtype)
    assume(result.isfinite().all())
    error = (restored(result, base).double() - result.double()).abs()
    wider_eps = torch.finfo(residual_dtype(base)).eps
    assert (error <= base.double().abs() * wider_eps + result.double().abs() * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_base_the_value_itself_is_stored(dtype):
    result = torch.randn(3, 5).to(dtype)
    assert torch.equal(restored(result, None), result)


def test_restored_values_are_copies():
    """What the graph does to a restored value must not reach the store, nor later stores reach the value."""
    result, stored = torch.randn(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    store_residual(result, None, stored)
    found = apply_residual(None, [stored], [1.0], torch.float64)
    found.zero_()
    assert torch.equal(stored, result)


def test_buffers_made_under_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        buffer = residual_like(torch.zeros(3))
    store_residual(torch.ones(3), torch.zeros(3), buffer)
    assert buffer.sum() == 3


def test_transposed_results_and_broadcast_bases():
    result = torch.randn(4, 6).t()
    assert torch.equal(restored(result, torch.randn(6, 4)), result)
