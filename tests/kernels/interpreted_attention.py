"""INT8 attention in Triton's interpreter, against float64. Run by test_kernels_interpreted.py, in a process.

The variable INTERPRETED_DTYPES has the names of the dtypes. With more than one the sweep is wide.
"""

import itertools
import math
import os

import pytest
import torch
from lib.attention import KEY_BIAS, exact, relative_error
from lib.interpreter import compute_as_hardware

from cachedit_fx.kernels.int8_attention import int8_attention_emulated
from cachedit_fx.kernels.int8_attention_triton import launch

DTYPES = tuple(getattr(torch, name) for name in os.environ["INTERPRETED_DTYPES"].split())
IS_WIDE = len(DTYPES) > 1
HEAD_DIMS = (40, 64, 72, 80, 96, 120, 128, 256) if IS_WIDE else (40, 120, 256)
LENGTHS = ((1, 1), (33, 65), (130, 200), (64, 128), (129, 63)) if IS_WIDE else ((33, 65),)
INT8, FP8 = 0.015, 0.05
"""Relative errors of normal inputs, by the dtype of values: the bounds."""


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    torch.manual_seed(0)
    compute_as_hardware(monkeypatch)


def inputs(dtype, head_dim=64, lengths=(70, 130), heads=(2, 2), look="tokens"):
    """Query, key and value as a transformer has them: views of [batch, length, heads, head_dim] among NaNs."""
    tensors = []
    for length, count in zip((lengths[0], lengths[1], lengths[1]), (heads[0], heads[1], heads[1]), strict=True):
        if look == "tokens":
            whole = torch.full((2, length + 3, count + 1, head_dim), math.nan, dtype=dtype)
            x = whole[:, 2 : length + 2, :count].transpose(1, 2)
        elif look == "every other":
            x = torch.full((2, count, length, 2 * head_dim), math.nan, dtype=dtype)[..., ::2]
        else:  # rows that start anywhere
            x = torch.full((2, count, length, head_dim + 3), math.nan, dtype=dtype)[..., 1 : head_dim + 1]
        tensors.append(x.copy_(torch.randn(x.shape)))
    return tensors


def check(tensors, mask=None, is_causal=False, scale=None, fp8_values=False, bound=INT8):
    """Near float64, and much nearer to the emulation."""
    query, key, value = tensors
    arguments = (mask, is_causal, scale)
    out, lse = launch(query, key, value, *arguments, True, fp8_values)
    assert out.dtype is query.dtype and out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    expected, expected_lse = exact(query, key, value, *arguments)
    assert relative_error(out, expected) < bound
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = expected_lse.isfinite()
    assert not (out[~finite] != 0).any()
    assert (lse[finite] - expected_lse[finite]).abs().amax() < 0.03 if finite.any() else True
    group = query.shape[1] != key.shape[1]
    emulated, its_lse = int8_attention_emulated(query, key, value, *arguments, group, True, fp8_values)
    assert relative_error(out, emulated.double()) < (0.025 if fp8_values else 0.004)
    torch.testing.assert_close(its_lse, lse, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("head_dim", "lengths"), list(itertools.product(HEAD_DIMS, LENGTHS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_lengths(dtype, head_dim, lengths):
    check(inputs(dtype, head_dim, lengths))


@pytest.mark.parametrize("lengths", [(130, 130), (70, 130), (130, 70)] if IS_WIDE else [(130, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal(dtype, lengths):
    check(inputs(dtype, 64, lengths), is_causal=True)


def masks(dtype):
    """[name, mask] for two samples, two heads, 70 queries and 130 keys."""
    keys = torch.rand(2, 1, 1, 130) > 0.3
    pairs = torch.rand(2, 2, 70, 130) > 0.3
    pairs[0, 1, 3] = False
    bias = torch.randn(2, 2, 70, 130).to(dtype)
    yield "keys", keys
    yield "pairs, one row without a key", pairs
    yield "pairs, each for all heads", pairs[:, :1]
    yield "two dimensions", pairs[1, 1]
    yield "keys, expanded", keys.expand(-1, -1, 70, -1)
    yield "every other column", torch.rand(2, 1, 70, 260).gt(0.3)[..., ::2]
    yield "bias of keys", bias[:, :, :1]
    yield "bias of pairs", bias.masked_fill(~pairs, -math.inf)
    yield "lowest number", torch.zeros(2, 1, 1, 130, dtype=dtype).masked_fill(~keys, torch.finfo(dtype).min)


@pytest.mark.parametrize("index", range(9) if IS_WIDE else (0, 7))
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype, index):
    _, mask = list(masks(dtype))[index]
    check(inputs(dtype), mask)


def test_a_row_of_the_lowest_number_has_equal_weights():
    query, key, value = inputs(torch.float32)
    mask = torch.full((1, 1, 1, 130), torch.finfo(torch.float32).min)
    mean = value.mean(2, keepdim=True).expand_as(query)
    torch.testing.assert_close(launch(query, key, value, mask), mean, rtol=1e-3, atol=1e-4)


def test_groups_of_heads_and_a_scale():
    check(inputs(torch.bfloat16, heads=(4, 2)), scale=-0.1)


@pytest.mark.parametrize("look", ["every other", "anywhere"])
def test_rows_that_are_not_aligned_are_copied(look):
    check(inputs(torch.bfloat16, look=look))


@pytest.mark.parametrize("head_dim", (40, 96, 128, 256) if IS_WIDE else (96,))
@pytest.mark.parametrize("form", ["plain", "causal", "mask"] if IS_WIDE else ["mask"])
def test_values_in_e4m3(head_dim, form):
    query, key, value = inputs(torch.bfloat16, head_dim, (70, 130), (4, 2))
    value *= torch.logspace(-3, 3, head_dim)
    mask = torch.rand(2, 1, 1, 130) > 0.3 if form == "mask" else None
    expected, _ = exact(query, key, value, mask, form == "causal")
    scale = value.double().std((0, 1, 2))
    out = launch(query, key, value, mask, form == "causal", None, False, True)
    assert relative_error(out / scale, expected / scale) < FP8
    check((query, key, value), mask, form == "causal", fp8_values=True, bound=FP8)


def test_smoothing_keeps_keys_with_an_offset_apart():
    """Without it the offset takes the codes: the error would be that of `KEY_BIAS` times larger keys."""
    query, key, value = inputs(torch.float32)
    check((query, key + KEY_BIAS, value))


def test_zeros_and_what_is_not_finite():
    query, key, value = inputs(torch.float32)
    expected = value.mean(2, keepdim=True).expand_as(query)
    for zeros in (query, key):
        first, second = (torch.zeros_like(x) if x is zeros else x for x in (query, key))
        out = launch(first, second, value)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    for bad in (math.nan, math.inf):
        broken = query.clone()
        broken[1, 1, 7, 3] = bad
        wrong = launch(broken, key, value).isnan().any(-1)
        assert wrong[1, 1, 7] and wrong.sum() == 1
        broken = key.clone()
        broken[1, 1, 7, 3] = bad
        assert torch.equal(launch(query, broken, value).isnan().all(-1).all(-1), torch.tensor([[0, 0], [0, 1]]).bool())


def test_nothing():
    query, key, value = inputs(torch.bfloat16)
    out, lse = launch(query[:, :, :0], key, value, return_lse=True)
    assert out.shape == (2, 2, 0, 64) and lse.shape == (2, 2, 0)
