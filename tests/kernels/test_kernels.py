"""The ops on a CPU against float64, and the promise that what was stored comes back to the bit: by the loops of
`cpu.cpp`, and by torch's ops, which take their place where there is no compiler.

The Triton kernels behind them: test_kernels_interpreted.py. How the loops are compiled: test_kernels_cpu.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cachedit_fx.kernels import cpu
from cachedit_fx.kernels.l1_sums import absolute_sums, l1_sums, residual
from cachedit_fx.kernels.layout import collapsed
from cachedit_fx.kernels.quant_fp8 import dequant_fp8, dequantized, quant_fp8, quantized
from cachedit_fx.kernels.residual_apply import MAX_TERMS, residual_apply, weighted_sum
from cachedit_fx.kernels.residual_store import difference, residual_dtype, residual_like, residual_store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (1, 1, 1), (2, 7, 5), (1, 33, 129), (3, 2, 2500))
"""The last one has rows of more than a tile of the loops."""


@pytest.fixture(autouse=True, params=["loops", "torch"], scope="module")
def path(request):
    """What the ops run on: the compiled loops, or torch's ops alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(cpu, "_loop", lambda *_: None)
        yield request.param


def sliced(values, extra=3):
    """`values` as a part of a longer stream; NaN lies around it."""
    dim = max(values.ndim - 2, 0)
    whole = [size + 2 * extra * (d == dim) for d, size in enumerate(values.shape)]
    around = torch.full(whole, math.nan, dtype=values.dtype)
    return around.narrow(dim, extra, values.shape[dim]).copy_(values)


LOOKS = {
    "contiguous": lambda values: values,
    "sliced": sliced,
    "chunk": lambda values: torch.cat([values, values * math.nan], -1).split(values.shape[-1], -1)[0],
    "transposed": lambda values: values.transpose(0, -1).contiguous().transpose(0, -1),
}


def normal(shape, dtype=torch.float32, look="contiguous"):
    return LOOKS[look](torch.randn(shape).to(dtype))


# l1_sums


def exact_sums(hidden, base, previous):
    """In float64, of residuals rounded to float32: inputs in 16 bits are taken as they are."""
    return absolute_sums(previous.double(), residual(hidden, base).double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_agree_with_float64(dtype, look, shape):
    hidden, before, base = (normal(shape, dtype, look) for _ in range(3))
    previous, current = residual(before, base), residual(hidden, base)
    assert previous.dtype is current.dtype is torch.float32
    assert torch.equal(current.double(), (hidden.double() - base.double()).float().double())
    out = torch.empty(shape)
    found = l1_sums(hidden, base, [previous.contiguous()], out)
    assert found.is_floating_point() and found.itemsize >= 4 and found.shape == (1, 2)
    assert torch.equal(out, current)
    expected = exact_sums(hidden, base, previous)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
    reference = absolute_sums(previous, current)
    assert reference.dtype is torch.float32
    torch.testing.assert_close(reference.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_sums_against_two_and_of_samples(look, per_sample):
    hidden, base = normal((2, 9, 5), torch.bfloat16, look), normal((2, 9, 5), torch.bfloat16)
    previous, out = torch.randn(2, 2, 9, 5), torch.empty(2, 9, 5)
    found = l1_sums(hidden, base, list(previous), out, per_sample)
    assert torch.equal(out, residual(hidden, base))
    whole = [(hidden, base, previous)]
    samples = zip(hidden, base, previous.transpose(0, 1), strict=True) if per_sample else whole
    expected = torch.stack([torch.stack([exact_sums(x, y, before) for before in both]) for x, y, both in samples])
    torch.testing.assert_close(found.double(), expected if per_sample else expected[0], rtol=1e-5, atol=0)
    assert found.shape == ((2, 2, 2) if per_sample else (2, 2))


@pytest.mark.parametrize("per_sample", [False, True])
def test_sums_against_none_only_store_the_residual(per_sample):
    hidden, base, out = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.empty(3, 4, 5)
    assert l1_sums(hidden, base, [], out, per_sample).shape == ((3, 0, 2) if per_sample else (0, 2))
    assert torch.equal(out, hidden - base)


@pytest.mark.parametrize("shape", [(0,), (0, 4, 4), (2, 0, 4)])
def test_sums_of_nothing_are_zero(shape):
    x = torch.empty(shape)
    assert l1_sums(x, x, [x], x.clone()).tolist() == [[0, 0]]
    assert l1_sums(x, x, [x], x.clone(), per_sample=True).tolist() == [[[0, 0]]] * shape[0]


def sums_of(previous, current):
    """With `current` as hidden states and no base; the reference gives the same."""
    (found,) = l1_sums(current, None, [previous], None)
    assert torch.allclose(found.float(), absolute_sums(previous, current.float()), rtol=0, atol=0, equal_nan=True)
    return found.tolist()


def test_the_loop_loses_nothing_when_it_adds_tiles(path):
    """2^24 in one tile and 1 in the next: float32 would drop the 1."""
    current = torch.zeros(1025)
    current[0], current[1024] = 2.0**24, 1
    (found,) = l1_sums(current, None, [2 * current], None)
    assert found.dtype is (torch.float64 if path == "loops" else torch.float32)
    if path == "loops":
        assert found.tolist() == [2**24 + 1, 2**25 + 2]


def test_neighbouring_bfloat16_steps_do_not_become_equal():
    """Two residuals that differ in one element of many: a bfloat16 mean would lose it."""
    before = torch.ones(1, 64, 64, dtype=torch.bfloat16)
    now = before.clone()
    now[0, 0, 0] = 2
    zeros = torch.zeros_like(now)
    found = l1_sums(now, zeros, [residual(before, zeros)], residual_like(now))
    assert found.tolist() == [[1, 4096]]


def test_residual_without_base_is_the_value_itself_in_float32():
    hidden = torch.randn(3, dtype=torch.bfloat16)
    assert torch.equal(residual(hidden, None), hidden.float())
    assert l1_sums(hidden, None, [hidden.float()], None)[0, 0] == 0


@pytest.mark.parametrize(
    ("previous", "current", "expected"),
    [(0.0, 0.0, [0, 0]), (1.0, 1.0, [0, 5]), (1.0, 0.0, [5, 5]), (1.0, 4.0, [15, 5]), (-1.0, 1.0, [10, 5])],
)
def test_sums_of_constants(previous, current, expected):
    assert sums_of(torch.full((5,), previous), torch.full((5,), current)) == expected


@pytest.mark.parametrize(("previous", "current"), [(math.nan, 1), (1, math.nan), (math.inf, math.inf), (1, math.inf)])
def test_the_change_is_not_finite_if_an_input_is_not(previous, current):
    first, second = torch.ones(4), torch.ones(4)
    first[2], second[2] = previous, current
    change, _ = sums_of(first, second)
    assert not math.isfinite(change)


def test_sums_refuse_a_base_without_out():
    x = torch.ones(3)
    for base, out in ((x, None), (None, x)):
        with pytest.raises(ValueError, match="out goes with base"):
            l1_sums(x, base, [x], out)


# residual_store and residual_apply


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
    assert residual_dtype(value, "model") is dtype
    assert residual_dtype(value, "float32") is (torch.float32 if dtype.is_floating_point else dtype)


def restored(result, base, kind="wider"):
    out, again = residual_like(result, kind), torch.empty_like(result)
    residual_store([result], [base], [out])
    residual_apply([base], [[out]], [1.0], [again])
    return again


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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8, torch.int64])
def test_without_a_base_the_value_itself_is_stored(dtype):
    result = (100 * torch.randn(3, 5)).to(dtype)
    assert torch.equal(restored(result, None), result)


def one_by_one(base, residuals, weights):
    """What the loops do to the bit, by numpy: no product is added without having been rounded."""
    summed = np.float64 if residuals[0].dtype is torch.float64 else np.float32
    values = [residual.double().numpy().astype(summed) for residual in residuals]
    total = summed(-0.0) if base is None else base.double().numpy().astype(summed)
    for weight, value in zip(weights, values, strict=True):
        total = total + summed(weight) * value
    return torch.from_numpy(total)


@pytest.mark.parametrize("kind", ["wider", "model", "float32"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_a_region(path, dtype, look, kind):
    """Several results of different shapes, one without a base, one empty; every number of residuals."""
    shapes = ((2, 9, 5), (2, 1, 5), (3, 4), (11,), (2, 0, 4), (2, 3, 1500))
    results, bases = ([normal(shape, dtype, look) for shape in shapes] for _ in range(2))
    bases[2] = None
    for n_terms in (1, 2, MAX_TERMS, MAX_TERMS + 1):
        stored = [[residual_like(result, kind) for _ in range(n_terms)] for result in results]
        for j in range(n_terms):
            later = [result * (j + 1) for result in results]
            residual_store(later, bases, [residuals[j] for residuals in stored])
            for result, base, residuals in zip(later, bases, stored, strict=True):
                assert torch.equal(residuals[j], difference(result, base, residuals[j].dtype))
        weights = torch.randn(n_terms).tolist()
        outs = [torch.empty_like(result) for result in results]
        residual_apply(bases, stored, weights, outs)
        for base, residuals, out in zip(bases, stored, outs, strict=True):
            if path == "loops" and look != "transposed" and dtype is not torch.float16:
                assert torch.equal(out, one_by_one(base, residuals, weights).to(dtype))
            if path == "torch":
                assert torch.equal(out, weighted_sum(base, residuals, weights).to(dtype))
            terms = [weight * r.double() for weight, r in zip(weights, residuals, strict=True)]
            terms += [] if base is None else [base.double()]
            summed = torch.finfo(residuals[0].dtype).eps * sum(term.abs() for term in terms) * n_terms
            error = (out.double() - sum(terms)).abs()
            assert (error <= summed + sum(terms).abs() * torch.finfo(dtype).eps).all()


def test_restored_values_are_copies():
    """What the graph does to a restored value must not reach the store, nor later stores reach the value."""
    result, stored, found = torch.randn(4, dtype=torch.float64), *torch.empty(2, 4, dtype=torch.float64)
    residual_store([result], [None], [stored])
    residual_apply([None], [[stored]], [1.0], [found])
    found.zero_()
    assert torch.equal(stored, result)


def test_buffers_made_under_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        buffer = residual_like(torch.zeros(3))
    residual_store([torch.ones(3)], [torch.zeros(3)], [buffer])
    assert buffer.sum() == 3


def test_transposed_results():
    result = torch.randn(4, 6).t()
    assert torch.equal(restored(result, torch.randn(6, 4)), result)


def test_bases_and_residuals_stay_as_they_are():
    base, stored = torch.randn(5), [torch.randn(5), torch.randn(5)]
    before = [x.clone() for x in (base, *stored)]
    residual_apply([base], [stored], [2.0, -1.0], [torch.empty(5)])
    residual_apply([None], [stored], [1.0, 2.0], [torch.empty(5)])
    assert all(map(torch.equal, (base, *stored), before))


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_a_float64_model_is_summed_in_float64_whatever_its_residuals_are_kept_in(state):
    base, residual = torch.randn(5, dtype=torch.float64), torch.randn(5).to(state)
    out = torch.empty_like(base)
    residual_apply([base], [[residual]], [1.0], [out])
    assert torch.equal(out, base + residual.double())


# quant_fp8


def near(found, x):
    """Within half a step of x: a 16th of its size, and 2^-10 of a scale where it is small."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    return ((found.double() - x.double()).abs() <= (x.double().abs() / 16).maximum(scale * 2**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(2, 9, 4, 16), (4, 8), (7, 1, 128), (3, 5, 3, 5), (6, 1, 1), (2, 0, 4, 8)])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_values_are_near_and_those_of_the_reference(dtype, look, shape):
    """heads * head_dim need not be a multiple of four."""
    x = normal(shape, dtype, look)
    packed = quant_fp8(x)
    *leading, heads, head_dim = shape
    assert packed.is_contiguous() and packed.dtype is torch.uint8
    assert packed.shape == (*leading, heads * (head_dim + 4))
    found = dequant_fp8(packed, heads, torch.float32)
    assert found.is_contiguous() and found.shape == shape
    values, scales = quantized(x)
    assert torch.equal(packed[..., : heads * head_dim], values.view(torch.uint8).flatten(-2))
    assert torch.equal(packed[..., heads * head_dim :], scales.view(torch.uint8).flatten(-2))
    assert torch.equal(found, dequantized(values, scales)) and near(found, x)
    assert torch.equal(dequant_fp8(packed, heads, dtype), found.to(dtype))


def test_what_a_permuted_view_packs_is_read_back_permuted():
    """As the all-to-all sends it: [world, batch, sequence, heads / world, head_dim], and back."""
    x = torch.randn(2, 6, 4, 16)
    packed = quant_fp8(x.view(2, 6, 2, 2, 16).permute(2, 0, 1, 3, 4))
    found = dequant_fp8(packed.permute(1, 2, 0, 3), 2, torch.float32).view(x.shape)
    assert torch.equal(found, dequant_fp8(quant_fp8(x), 4, torch.float32)) and near(found, x)


def test_packed_rows_may_begin_anywhere():
    packed = quant_fp8(torch.randn(3, 4, 16))
    lying = torch.zeros(3, packed.shape[-1] + 1, dtype=torch.uint8)[:, 1:].copy_(packed)
    assert torch.equal(dequant_fp8(lying, 4, torch.float32), dequant_fp8(packed, 4, torch.float32))


def test_all_codes_come_back():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    packed = torch.cat([codes, torch.ones(2, 1).view(torch.uint8)], 1)
    found = dequant_fp8(packed, 1, torch.float32)
    assert torch.equal(found[:, 0].nan_to_num(nan=1e9), codes.view(torch.float8_e4m3fn).float().nan_to_num(nan=1e9))
    assert torch.equal(quant_fp8(found), packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_reach_the_scale(dtype):
    x = torch.zeros(4, 1, 8, dtype=dtype)
    x[1, 0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 448.0])
    x[2] = math.nan
    x[3] = torch.finfo(dtype).max
    found = dequant_fp8(quant_fp8(x), 1, dtype)[:, 0]
    assert not found[0].any() and found[2].isnan().all() and torch.equal(found[3], x[3, 0])
    assert found[1].nan_to_num(nan=7).tolist() == [448, -448, 7, 448, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(17.0, 16.0), (19.0, 20.0), (2.0**-10, 0.0), (3 * 2.0**-10, 2.0**-8), (2.0**-9, 2.0**-9), (-0.0, -0.0)],
)
def test_ties_go_to_the_even_code(value, expected):
    """Beside 448 the scale is 1."""
    found = dequant_fp8(quant_fp8(torch.tensor([[448.0, value]])), 1, torch.float32)[0, 1].item()
    assert found == expected and math.copysign(1, found) == math.copysign(1, expected)


def test_the_views_of_an_all_to_all_are_read_without_a_copy():
    x = torch.empty(2, 6, 4, 16)
    view = x.view(2, 6, 2, 2, 16).permute(2, 0, 1, 3, 4)
    assert collapsed(view, 3) == ([1, 2, 12], [0, 32, 64])
    heads_first = torch.empty(2, 4, 6, 16).view(2, 2, 2, 6, 16).permute(1, 0, 3, 2, 4)
    assert collapsed(heads_first, 3) == ([2, 2, 6], [2 * 6 * 16, 4 * 6 * 16, 16])
    assert collapsed(x, 2) == ([1, 1, 12], [0, 0, 64])
    assert collapsed(x[0, 0], 0) == ([1, 1, 1], [0, 0, 0])
    assert collapsed(x[:1].expand(3, -1, -1, -1), 2) == ([1, 3, 6], [0, 0, 64])
    assert collapsed(torch.empty(3, 3, 3, 3, 4, 16)[:2, :2, :2, :2], 4) is None


def test_quant_refuses_what_it_cannot_pack():
    others = (torch.ones(2, 3, dtype=dtype) for dtype in (torch.float64, torch.int32))
    for x in (torch.ones(3), torch.ones(2, 0), *others):
        with pytest.raises(ValueError, match="quant_fp8 takes"):
            quant_fp8(x)


@pytest.mark.parametrize("heads", [0, 3, 10, 20])
def test_dequant_refuses_rows_of_other_sizes(heads):
    with pytest.raises(ValueError, match="no row of"):
        dequant_fp8(torch.zeros(2, 40, dtype=torch.uint8), heads, torch.float32)


def test_dequant_refuses_other_dtypes():
    for packed, dtype in ((torch.zeros(2, 40), torch.float32), (torch.zeros(2, 40, dtype=torch.uint8), torch.int32)):
        with pytest.raises(ValueError, match="dequant_fp8 takes"):
            dequant_fp8(packed, 4, dtype)


# quant_fp8 and dequant_fp8 as ops


def op_calls():
    yield "quant_fp8", (torch.randn(2, 5, 2, 4, 8, dtype=torch.bfloat16).permute(2, 0, 1, 3, 4),)
    yield "dequant_fp8", (quant_fp8(torch.randn(2, 5, 4, 8)), 4, torch.bfloat16)


@pytest.mark.parametrize("index", range(2))
def test_ops_are_registered_rightly(index):
    """Schema (what is written, what is an alias), fake implementation, tracing with symbolic sizes."""
    name, args = list(op_calls())[index]
    torch.library.opcheck(getattr(torch.ops.cachedit_fx, name).default, args)
