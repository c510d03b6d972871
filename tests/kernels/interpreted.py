"""The kernels' numerics in Triton's interpreter, against float64. Run by test_kernels_interpreted.py, in a process.

The variable INTERPRETED_DTYPES has the names of the dtypes.

Inputs lie among NaNs and outputs between guards, so that an element read or written elsewhere shows.
"""

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from lib.interpreter import BITS, compute_as_hardware

from cachedit_fx.kernels import (
    l1_sums_triton,
    quant_fp8,
    quant_fp8_triton,
    residual_apply_triton,
    residual_store,
    residual_store_triton,
)

DTYPES = tuple(getattr(torch, name) for name in os.environ["INTERPRETED_DTYPES"].split())
SHAPES = ((1,), (5,), (3, 1), (1, 1, 1), (2, 7, 5), (2, 1, 300), (1, 33, 129), (2, 9, 300))
EMPTY = ((0,), (0, 4, 4), (2, 0, 4), (2, 3, 0))
LOOKS = ("contiguous", "sliced", "chunk", "transposed", "every other")
GUARD = 16


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    compute_as_hardware(monkeypatch)


def lying(values, look="contiguous"):
    """`values` in memory that is NaN everywhere else."""
    shape = values.shape
    if look == "contiguous":
        around = torch.full((values.numel() + 2 * GUARD,), math.nan, dtype=values.dtype)
        found = around[GUARD : GUARD + values.numel()].view(shape)
    elif look == "sliced":  # as the text or the picture lies in a joint stream
        dim = max(values.ndim - 2, 0)
        whole = [size + 5 * (d == dim) for d, size in enumerate(shape)]
        found = torch.full(whole, math.nan, dtype=values.dtype).narrow(dim, 3, shape[dim])
    elif look == "chunk":  # of a projection's columns
        found = torch.full((*shape[:-1], 3 * shape[-1] + 2), math.nan, dtype=values.dtype)[..., 2 : shape[-1] + 2]
    elif look == "transposed":
        found = torch.full(shape[::-1], math.nan, dtype=values.dtype).permute(*reversed(range(values.ndim)))
    else:
        found = torch.full((*shape[:-1], 2 * shape[-1]), math.nan, dtype=values.dtype)[..., ::2]
    return found.copy_(values)


class Out:
    """Memory for a result; the guards around it must stay as they are."""

    def __init__(self, shape, dtype):
        size = math.prod(shape)
        self.memory = torch.full((size + 2 * GUARD,), 77, dtype=dtype)
        self.value = self.memory[GUARD : GUARD + size].view(shape)

    def check(self):
        assert (self.memory[:GUARD] == 77).all() and (self.memory[self.memory.numel() - GUARD :] == 77).all()
        return self.value


def normal(shape, dtype, look="contiguous"):
    return lying(torch.randn(shape).to(dtype), look)


# l1_sums


def exact_sums(hidden, base, previous, per_sample=False):
    """In float64, of r rounded to float32."""
    r = (hidden.float() if base is None else hidden.float() - base.float()).double()
    dims = tuple(range(1, r.ndim)) if per_sample else tuple(range(r.ndim))

    def norm(x):
        return x.abs().sum(dims) if dims else x.abs()

    return torch.stack([torch.stack([norm(x.double() - r), norm(x.double())], -1) for x in previous], -2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_l1_sums(dtype, look, shape):
    hidden, base = normal(shape, dtype, look), normal(shape, dtype)
    previous = [normal(shape, torch.float32) for _ in range(l1_sums_triton.MAX_PREVIOUS)]
    out = Out(shape, torch.float32)
    found = l1_sums_triton.launch(hidden, base, previous, out.value)
    assert torch.equal(out.check(), hidden.float() - base.float())
    torch.testing.assert_close(found.double(), exact_sums(hidden, base, previous), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("look", LOOKS)
def test_l1_sums_per_sample(look, shape):
    hidden, base = normal(shape, torch.bfloat16), normal(shape, torch.bfloat16, look)
    previous = [normal(shape, torch.float32) for _ in range(l1_sums_triton.MAX_PREVIOUS)]
    out = Out(shape, torch.float32)
    found = l1_sums_triton.launch(hidden, base, previous, out.value, per_sample=True)
    assert found.shape == (shape[0], l1_sums_triton.MAX_PREVIOUS, 2)
    assert torch.equal(out.check(), hidden.float() - base.float())
    torch.testing.assert_close(found.double(), exact_sums(hidden, base, previous, True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("look", ["contiguous", "sliced"])
def test_l1_sums_without_base_and_without_previous(look, per_sample):
    hidden = normal((2, 9, 300), torch.bfloat16, look)
    previous = [normal(hidden.shape, torch.float32)]
    found = l1_sums_triton.launch(hidden, None, previous, None, per_sample)
    torch.testing.assert_close(found.double(), exact_sums(hidden, None, previous, per_sample), rtol=1e-5, atol=0)
    out = Out(hidden.shape, torch.float32)
    found = l1_sums_triton.launch(hidden, torch.ones_like(hidden), [], out.value, per_sample)
    assert found.shape == ((2, 0, 2) if per_sample else (0, 2))
    assert torch.equal(out.check(), hidden.float() - 1)


def test_l1_sums_totals_more_tiles_than_one_step_adds(monkeypatch):
    monkeypatch.setattr(l1_sums_triton, "TOTAL_BLOCK", 4)
    shape = (2, 5 * 2048 + 1)
    hidden, base, previous = normal(shape, torch.float16), normal(shape, torch.float16), normal(shape, torch.float32)
    for per_sample in (False, True):
        found = l1_sums_triton.launch(hidden, base, [previous], torch.empty(shape), per_sample)
        expected = exact_sums(hidden, base, [previous], per_sample)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", EMPTY)
def test_l1_sums_of_nothing_are_zero(shape):
    x, before = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape)
    assert l1_sums_triton.launch(x, x, [before], torch.empty(shape)).tolist() == [[0, 0]]
    assert l1_sums_triton.launch(x, x, [before], torch.empty(shape), True).tolist() == [[[0, 0]]] * shape[0]


def test_l1_sums_puts_the_change_first():
    zeros, ones = torch.zeros(2, 300), torch.ones(2, 300)
    assert l1_sums_triton.launch(ones, ones, [zeros], torch.empty(2, 300)).tolist() == [[0, 0]]
    found = l1_sums_triton.launch(ones, zeros, [zeros, 3 * ones], torch.empty(2, 300))
    assert found.tolist() == [[600, 0], [1200, 1800]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(3))
def test_l1_sums_are_not_finite_if_an_input_is_not(where, value):
    given = [torch.ones(2, 300) for _ in range(3)]
    given[where][1, 7] = value
    hidden, base, previous = given
    found = l1_sums_triton.launch(hidden, base, [previous], torch.empty(2, 300), per_sample=True)
    assert found[0].tolist() == [[300, 300]] and not found[1].isfinite().all()


def test_l1_sums_refuses_too_many_previous():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="residuals to compare with"):
        l1_sums_triton.launch(x, None, [x] * (l1_sums_triton.MAX_PREVIOUS + 1), None)


# residual_store and residual_apply

KINDS = ("wider", "model", "float32")


def looking(count):
    return [LOOKS[i % len(LOOKS)] for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_store(dtype, kind):
    """All shapes in one call, results and bases in all looks."""
    shapes = (*SHAPES, *SHAPES, *EMPTY)
    results = [normal(shape, dtype, look) for shape, look in zip(shapes, looking(len(shapes)), strict=True)]
    bases = [normal(shape, dtype, look) for shape, look in zip(shapes, looking(len(shapes))[::-1], strict=True)]
    state = residual_store.residual_dtype(results[0], kind)
    outs = [Out(shape, state) for shape in shapes]
    residual_store_triton.launch(results, bases, [out.value for out in outs])
    for result, base, out in zip(results, bases, outs, strict=True):
        wide = torch.float64 if state is torch.float64 else torch.float32
        assert torch.equal(out.check(), (result.to(wide) - base.to(wide)).to(state))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_store_one_by_one(shape, look):
    result, base = normal(shape, torch.bfloat16, look), normal(shape, torch.bfloat16, "sliced")
    out = Out(shape, torch.float32)
    residual_store_triton.launch([result], [base], [out.value])
    assert torch.equal(out.check(), result.float() - base.float())


def bound(dtype, state, exact, terms):
    """Of the error: a rounding to `dtype`, and float32 sums where the residuals are no float64."""
    summed = 0 if state is torch.float64 else len(terms) * 2.0**-24 * sum(term.abs() for term in terms)
    return exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + summed + torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("n_terms", range(1, residual_apply_triton.MAX_TERMS + 1))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_apply(dtype, kind, n_terms):
    """Results of different sizes, bases in all looks; every fifth result has none."""
    shapes = (*SHAPES, *EMPTY) if n_terms in (1, 3) else ((2, 9, 300), (2, 1, 300), (2, 3, 5))
    looks = looking(len(shapes)) if n_terms != 1 else looking(len(shapes))[::-1]
    bases = [normal(shape, dtype, look) for shape, look in zip(shapes, looks, strict=True)]
    bases = [None if i % 5 == 4 else base for i, base in enumerate(bases)]
    state = residual_store.residual_dtype(torch.empty(0, dtype=dtype), kind)
    stored = [[normal(shape, state) for _ in range(n_terms)] for shape in shapes]
    weights = torch.randn(n_terms).tolist()
    outs = [Out(shape, dtype) for shape in shapes]
    residual_apply_triton.launch(bases, stored, weights, [out.value for out in outs])
    for base, residuals, out in zip(bases, stored, outs, strict=True):
        terms = [weight * r.double() for weight, r in zip(weights, residuals, strict=True)]
        terms += [] if base is None else [base.double()]
        exact = sum(terms)
        assert ((out.check().double() - exact).abs() <= bound(dtype, state, exact, terms)).all()


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_stored_comes_back_to_the_bit(dtype, look):
    shapes = ((2, 9, 300), (2, 1, 300), (3, 5), (7,), (2, 4, 33))
    results = [normal(shape, dtype) for shape in shapes]
    bases = [normal(shape, dtype, look) for shape in shapes]
    # As far apart as the wider dtype has bits for.
    bases = [base * 2.0 ** (4 if dtype is torch.float16 else 6) for base in bases]
    stored = [Out(shape, residual_store.residual_dtype(result)) for shape, result in zip(shapes, results, strict=True)]
    outs = [Out(shape, dtype) for shape in shapes]
    residual_store_triton.launch(results, bases, [out.value for out in stored])
    residual_apply_triton.launch(bases, [[out.check()] for out in stored], [1.0], [out.value for out in outs])
    for result, base, out in zip(results, bases, outs, strict=True):
        spared = result.abs() >= base.abs() * 2.0**-12
        assert spared.float().mean() > 0.9 or result.numel() < 20
        assert torch.equal(out.check()[spared], result[spared])


def test_residual_apply_refuses_too_many_terms():
    x, n_terms = torch.ones(3), residual_apply_triton.MAX_TERMS + 1
    with pytest.raises(ValueError, match="residuals of each result"):
        residual_apply_triton.launch([x], [[x] * n_terms], [1.0] * n_terms, [torch.empty(3)])


# quant_fp8


@triton.jit
def _encode(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    codes = quant_fp8_triton._to_e4m3(tl.load(x_ptr + at, at < n, other=0.0))
    tl.store(out_ptr + at, codes.to(tl.uint8), at < n)


def encode(x):
    out = torch.empty(x.shape, dtype=torch.uint8)
    _encode[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), 4096)
    return out


def decode(codes):
    """Values of `codes` by torch, whose conversion from float8 is exact."""
    return codes.view(torch.float8_e4m3fn).double()


def nearest(x):
    """The codes of `x` by definition: the nearest of the 127 sizes, the even code where two are as near."""
    sizes = decode(torch.arange(127, dtype=torch.uint8))
    size = x.double().abs().clamp(max=448)
    above = torch.searchsorted(sizes, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    down, up = size - sizes[below], sizes[above] - size
    code = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return torch.where(x.isnan(), 0x7F, code).to(torch.uint8) | (x.view(torch.int32) < 0).to(torch.uint8) * 0x80


def test_every_bfloat16_becomes_its_nearest_code():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    assert torch.equal(encode(x), nearest(x))


def test_ties_and_their_neighbours_become_their_nearest_code():
    sizes = decode(torch.arange(127, dtype=torch.uint8))
    ties = ((sizes[1:] + sizes[:-1]) / 2).float()
    values = torch.cat([ties, sizes.float(), torch.tensor([464.0, 465, 480, 2.0**-149, 2.0**-127])])
    values = torch.cat([values, *(values.nextafter(torch.tensor(to)) for to in (math.inf, 0.0))])
    values = torch.cat([values, -values])
    assert torch.equal(encode(values), nearest(values))
    assert encode(ties[:3]).tolist() == [0, 2, 2], "half of the smallest goes to 0, the next ties to the even code"


@pytest.mark.parametrize(
    ("value", "code"),
    [(448, 0x7E), (464, 0x7E), (1e30, 0x7E), (math.inf, 0x7E), (-math.inf, 0xFE), (math.nan, 0x7F), (-0.0, 0x80)],
)
def test_edges(value, code):
    assert encode(torch.tensor([float(value)])).tolist() == [code]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_decode_exactly_and_come_back(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    one = torch.ones(2, 1).view(torch.uint8)
    packed = torch.cat([codes, one], 1)
    found = quant_fp8_triton.launch_dequant(packed, 1, dtype)[:, 0]
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert found.isnan().sum() == 2
    finite = ~found.isnan()
    assert torch.equal(found.view(BITS[dtype.itemsize])[finite], expected.view(BITS[dtype.itemsize])[finite])
    again = quant_fp8_triton.launch_quant(found[:, None])  # 448 is in each half, so the scale is 1 again
    assert torch.equal(again[:, 128:], one) and torch.equal(again[:, :128][finite], codes[finite])
    assert decode(again[:, :128])[~finite].isnan().all()


def sent(batch, sequence, heads, head_dim, dtype, world=2):
    """The view that an all-to-all over `world` sends."""
    x = normal((batch, sequence, heads, head_dim), dtype)
    return x.view(batch, sequence, world, heads // world, head_dim).permute(2, 0, 1, 3, 4)


def near(found, x):
    """Within half a step of x: a 16th of its size, and 2^-10 of a scale where it is small."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    error = (found.double() - x.double()).abs()
    return (error <= (x.double().abs() / 16).maximum(scale * 2**-10) * (1 + 1e-5)).all()


VIEWS = {
    "contiguous": lambda dtype: normal((2, 5, 4, 64), dtype),
    "sent": lambda dtype: sent(2, 5, 4, 64, dtype),
    "sent, one each": lambda dtype: sent(3, 5, 2, 128, dtype),
    "sent, heads first": lambda dtype: sent(4, 2, 6, 64, dtype).permute(0, 2, 3, 1, 4),
    "joint": lambda dtype: normal((2, 9, 4, 64), dtype)[:, 3:7],
    "chunk": lambda dtype: normal((2, 9, 4, 64), dtype, "chunk"),
    "five strides": lambda dtype: normal((3, 3, 3, 3, 4, 64), dtype)[:2, :2, :2, :2],
    "last not adjacent": lambda dtype: normal((2, 5, 4, 64), dtype, "every other"),
    "broadcast": lambda dtype: normal((1, 5, 4, 64), dtype).expand(3, -1, -1, -1),
    "a token": lambda dtype: normal((4, 64), dtype),
    "one head": lambda dtype: normal((7, 1, 128), dtype),
    "three heads of 72": lambda dtype: normal((5, 3, 72), dtype),
    "heads of 4": lambda dtype: normal((70, 3, 4), dtype),
    "heads of 256": lambda dtype: normal((9, 2, 256), dtype),
    "nothing": lambda dtype: normal((2, 0, 4, 64), dtype),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_and_dequant(dtype, view):
    """To the bit what torch's ops give, and near x."""
    x = VIEWS[view](dtype)
    *leading, heads, head_dim = x.shape
    packed = quant_fp8_triton.launch_quant(x)
    assert packed.is_contiguous() and packed.shape == (*leading, heads * (head_dim + 4))
    assert torch.equal(packed, quant_fp8.quant_fp8(x))
    found = quant_fp8_triton.launch_dequant(packed, heads, torch.float32)
    assert found.is_contiguous() and near(found, x)
    for result in (torch.float32, dtype):
        found = quant_fp8_triton.launch_dequant(packed, heads, result)
        assert torch.equal(found, quant_fp8.dequant_fp8(packed, heads, result))


def test_dequant_reads_what_was_received_in_the_order_that_is_wanted():
    x = torch.randn(2, 3, 5, 4, 64)  # world, batch, sequence / world, heads, head_dim
    received = quant_fp8_triton.launch_quant(x).transpose(0, 1)
    found = quant_fp8_triton.launch_dequant(received, 4, torch.float32)
    assert found.is_contiguous() and near(found, x.transpose(0, 1))


@pytest.mark.parametrize("step", [1, 2])
def test_dequant_copies_rows_that_are_not_adjacent_or_misaligned(step):
    packed = quant_fp8_triton.launch_quant(torch.randn(3, 4, 64))
    lies = torch.zeros(3, packed.shape[-1] * step + 1, dtype=torch.uint8)[:, : packed.shape[-1] * step : step]
    found = quant_fp8_triton.launch_dequant(lies.copy_(packed), 4, torch.float32)
    assert torch.equal(found, quant_fp8_triton.launch_dequant(packed, 4, torch.float32))


def test_heads_of_zeros_and_of_what_is_not_finite():
    x = torch.randn(6, 2, 64)
    x[0] = 0
    x[1, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    x[2] = math.nan
    x[3] = math.inf
    x[4, 0] = 1e-42
    x[5, 0, 0] = torch.finfo(torch.float32).max
    packed = quant_fp8_triton.launch_quant(x)
    assert torch.equal(packed, quant_fp8.quant_fp8(x))
    found = quant_fp8_triton.launch_dequant(packed, 2, torch.float32)
    assert not found[0].any() and found[2].isnan().all() and not found[4, 0].any()
    amax = x[1, 0, 3:].abs().max().item()
    assert found[1, 0, 0].isnan() and found[1, 0, 1:3].tolist() == pytest.approx([amax, -amax])
    assert near(found[1, 0, 3:], x[1, 0, 3:])
    assert found[3].isfinite().all() and found[5, 0, 0] == pytest.approx(torch.finfo(torch.float32).max)
