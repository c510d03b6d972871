"""Eight-bit queries, keys and values for the all-to-all of sequence parallelism, which is bound by the bytes it sends.

    amax  = max(|x| over the finite elements of a token's head, 2^-100)
    scale = amax / 448                  value = e4m3(x * (448 / amax))                  x ~ value * scale

    [..., heads, head_dim]  ->  uint8 [..., heads * head_dim values | heads float32 scales]

A scale travels in the row of its token, beside the values: one message, rows that stay multiples of 16 bytes where
`heads` is one of 4 and `head_dim` of 16. The view that an all-to-all sends ([world, batch, sequence, heads / world,
head_dim], permuted) is read where it lies, and so is what it received.

Values round to nearest, ties to even, saturate at +-448, infinities too, and stay NaN. Both conversions work on bits:
they need no fp8 unit, so compute capability 7.5 runs them, and gfx942, whose own format has another bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from . import cpu
from .layout import NUM_WARPS, device_of, jit, runs_on_triton, tl, tokens
from .variants import TYPES, Variant

LARGEST = 448.0
"""The largest finite e4m3 value. (Kernels cannot read these two.)"""
SMALLEST_AMAX = 2.0**-100
"""Keeps 0/0 apart from a number: zeros give zeros."""
SCALE_BYTES = 4
TILE = 4096
"""Elements of a tile: sixteen a thread, whose bytes are one store of 128 bits (AMD: eight a thread, 64 bits)."""
BLOCKS = (64, 128, 256)
"""Columns of a tile; a head is as wide as the widest at most, else torch's ops take it."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@jit
def _rows_of_tile(n_rows, heads, size_1, size_2, stride_0, stride_1, stride_2, BLOCK_ROWS: tl.constexpr):
    """Rows (a token's head each) of this program: numbers, tokens, heads, where the tokens lie, and which there are."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    tokens = rows // heads
    rest = tokens // size_2
    lies_at = (rest // size_1).to(tl.int64) * stride_0 + (rest % size_1).to(tl.int64) * stride_1
    lies_at += (tokens % size_2).to(tl.int64) * stride_2
    return rows, tokens.to(tl.int64), rows % heads, lies_at, rows < n_rows


@jit
def _to_e4m3(x):
    """The codes of float32 `x`, in the low eight bits."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    kept = tl.minimum(size, 0x43E00000)  # 448
    # Drops 20 bits of mantissa, ties to even by the last bit that stays; a carry goes on into the exponent, whose bias
    # is smaller by 120.
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, as are the floats from 2^14 on: the addition rounds.
    rounded = kept.to(tl.float32, bitcast=True) + 16384.0
    code = tl.where(kept < (121 << 23), rounded.to(tl.uint32, bitcast=True) - 0x46800000, normal)
    return tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@jit
def _from_e4m3(codes):
    """The values of uint8 `codes` in float32. Subnormal codes come of a difference, not of subnormal floats."""
    codes = codes.to(tl.uint32)
    size = codes & 0x7F
    small = ((size << 20) + (121 << 23)).to(tl.float32, bitcast=True) - 0.015625  # 2^-6
    bits = tl.where(size < 8, small.to(tl.uint32, bitcast=True), (size << 20) + (120 << 23))
    bits = tl.where(size == 0x7F, 0x7FC00000, bits) | ((codes & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@jit
def _quantize(
    x_ptr,
    packed_ptr,
    n_rows,
    heads,
    head_dim,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    head_stride,
    row_bytes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Row `token` of `packed_ptr` begins at token * row_bytes; token [i, j, k] of x at the sum of its strides."""
    _, tokens, head, lies_at, row_mask = _rows_of_tile(
        n_rows, heads, size_1, size_2, stride_0, stride_1, stride_2, BLOCK_ROWS
    )
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = row_mask & (cols < head_dim)
    at = lies_at + head.to(tl.int64) * head_stride
    x = tl.load(x_ptr + at + cols, mask, other=0.0).to(tl.float32)
    size = tl.abs(x)
    amax = tl.max(tl.where(size < float("inf"), size, 0.0), 1, keep_dims=True)
    amax = tl.maximum(amax, 7.888609052210118e-31)  # 2^-100
    row_ptr = packed_ptr + tokens * row_bytes
    codes = _to_e4m3(x * tl.div_rn(448.0, amax))
    tl.store(row_ptr + head * head_dim + cols, codes.to(tl.uint8), mask)
    scale_ptr = (row_ptr + heads * head_dim).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale_ptr + head, tl.div_rn(amax, 448.0), row_mask)


@jit
def _dequantize(
    packed_ptr,
    out_ptr,
    n_rows,
    heads,
    head_dim,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Row of token [i, j, k] begins in `packed_ptr` at the sum of its strides; the heads of `out_ptr` are adjacent."""
    rows, _, head, lies_at, row_mask = _rows_of_tile(
        n_rows, heads, size_1, size_2, stride_0, stride_1, stride_2, BLOCK_ROWS
    )
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = row_mask & (cols < head_dim)
    row_ptr = packed_ptr + lies_at
    codes = tl.load(row_ptr + head * head_dim + cols, mask, other=0)
    scale_ptr = (row_ptr + heads * head_dim).to(tl.pointer_type(tl.float32), bitcast=True)
    x = _from_e4m3(codes) * tl.load(scale_ptr + head, row_mask, other=0.0)
    tl.store(out_ptr + rows.to(tl.int64) * head_dim + cols, x.to(out_ptr.dtype.element_ty), mask)


def _tile(head_dim: int) -> tuple[int, int]:
    cols = next(block for block in BLOCKS if head_dim <= block)
    return TILE // cols, cols


def launch_quant(x: torch.Tensor) -> torch.Tensor:
    """As `quant_fp8`, by the kernel above."""
    packed = _empty_packed(x)
    if not x.numel():
        return packed
    x, seen = tokens(x, x.ndim - 2, x.shape[-2], x.shape[-1])
    tile = _tile(seen.head_dim)
    with device_of(x):
        _quantize[(-(-seen.rows // tile[0]),)](
            x, packed, *seen, x.stride(-2), packed.shape[-1], *tile, num_warps=NUM_WARPS
        )
    return packed


def launch_dequant(packed: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """As `dequant_fp8`, by the kernel above."""
    out = _empty_heads(packed, heads, dtype)
    if not out.numel():
        return out
    packed, seen = tokens(packed, packed.ndim - 1, heads, out.shape[-1], SCALE_BYTES)
    tile = _tile(seen.head_dim)
    with device_of(packed):
        _dequantize[(-(-seen.rows // tile[0]),)](packed, out, *seen, *tile, num_warps=NUM_WARPS)
    return out


def variants() -> Iterator[Variant]:
    """Every specialisation that the launchers can choose. A head need not fill its tile: 96 elements are in those of
    128. If their number is no multiple of 16, so is no address: the unaligned ones."""
    strides = ("stride_0", "stride_1", "stride_2")
    numbers = dict.fromkeys(("n_rows", "heads", "head_dim", "size_1", "size_2", *strides), "i32")
    constexprs = dict.fromkeys(("BLOCK_ROWS", "BLOCK_COLS"), "constexpr")
    for dtype, head_dim, aligned in itertools.product(FLOATS, BLOCKS, (True, False)):
        rows, cols = _tile(head_dim)
        name = f"{TYPES[dtype]}, heads of {cols}{'' if aligned else ', unaligned'}"
        values, scales = TILE * dtype.itemsize, rows * SCALE_BYTES
        yield Variant(
            _quantize,
            f"quant_fp8 {name}",
            {"x_ptr": f"*{TYPES[dtype]}", "packed_ptr": "*u8", **numbers, "head_stride": "i32", "row_bytes": "i32"}
            | constexprs,
            {"BLOCK_ROWS": rows, "BLOCK_COLS": cols},
            read_bytes=values,
            written_bytes=TILE,
            written_once=scales,
            aligned=aligned,
            multiples=frozenset({"head_dim", "head_stride", "row_bytes", *strides}),
        )
        yield Variant(
            _dequantize,
            f"dequant_fp8 {name}",
            {"packed_ptr": "*u8", "out_ptr": f"*{TYPES[dtype]}", **numbers, **constexprs},
            {"BLOCK_ROWS": rows, "BLOCK_COLS": cols},
            read_bytes=TILE + scales,
            written_bytes=values,
            aligned=aligned,
            multiples=frozenset({"head_dim", *strides}),
        )


def _row_bytes(heads: int, head_dim: int) -> int:
    return heads * (head_dim + SCALE_BYTES)


def _head_dim(packed: torch.Tensor, heads: int) -> int:
    return packed.shape[-1] // heads - SCALE_BYTES


def _empty_packed(x: torch.Tensor) -> torch.Tensor:
    """Memory for what `quant_fp8` returns."""
    *leading, heads, head_dim = x.shape
    return torch.empty((*leading, _row_bytes(heads, head_dim)), dtype=torch.uint8, device=x.device)


def _empty_heads(packed: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for what `dequant_fp8` returns."""
    return torch.empty((*packed.shape[:-1], heads, _head_dim(packed, heads)), dtype=dtype, device=packed.device)


def _has_kernel(tensor: torch.Tensor, tokens: int, heads: int, head_dim: int) -> bool:
    """Whether a head fits a tile, scales start at multiples of four bytes, and rows are counted in 32 bits."""
    fits = head_dim <= BLOCKS[-1] and tokens * heads < 2**31 - TILE
    return fits and heads * head_dim % SCALE_BYTES == 0 and runs_on_triton(tensor)


def quant_fp8(x: torch.Tensor) -> torch.Tensor:
    """Values and scales of `x`, packed.

    Args:
        x: [..., heads, head_dim]; bfloat16, float16 or float32, any strides.

    Returns:
        uint8, [..., heads * (head_dim + 4)], contiguous.

    Raises:
        ValueError: for another dtype, fewer than two dimensions, or heads of nothing.
    """
    if x.ndim < 2 or not x.shape[-1] or x.dtype not in FLOATS:
        raise ValueError(f"quant_fp8 takes 16- and 32-bit floats [..., heads, head_dim], not {x.dtype} {[*x.shape]}")
    *leading, heads, head_dim = x.shape
    if _has_kernel(x, math.prod(leading), heads, head_dim):
        return launch_quant(x)
    packed = _empty_packed(x)
    run = cpu.loop("quant_fp8", (x,), x.dtype)
    if run is not None:
        x, seen = tokens(x, x.ndim - 2, heads, head_dim)
        threads = torch.get_num_threads()
        run(cpu.Tokens(*seen), x.data_ptr(), x.stride(-2), packed.data_ptr(), packed.shape[-1], threads)
        return packed
    values, scales = quantized(x)
    packed[..., : heads * head_dim] = values.view(torch.uint8).flatten(-2)
    packed[..., heads * head_dim :] = scales.view(torch.uint8).flatten(-2)
    return packed


def dequant_fp8(packed: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """What `quant_fp8` packed.

    Args:
        packed: uint8, [..., heads * (head_dim + 4)], any strides: those of the order that x is wanted in.
        heads: of a token.
        dtype: of the result; bfloat16, float16 or float32.

    Returns:
        [..., heads, head_dim], contiguous.

    Raises:
        ValueError: for other dtypes, or rows that do not hold as many heads.
    """
    if packed.dtype is not torch.uint8 or dtype not in FLOATS:
        raise ValueError(f"dequant_fp8 takes uint8 and returns 16- and 32-bit floats; not {packed.dtype} and {dtype}")
    if not packed.ndim or heads < 1 or packed.shape[-1] % heads or _head_dim(packed, heads) < 1:
        raise ValueError(f"dequant_fp8: no row of {heads} heads and their scales in {[*packed.shape]}")
    head_dim = _head_dim(packed, heads)
    if _has_kernel(packed, math.prod(packed.shape[:-1]), heads, head_dim) and packed.data_ptr() % SCALE_BYTES == 0:
        return launch_dequant(packed, heads, dtype)
    run = cpu.loop("dequant_fp8", (packed,), dtype)
    if run is not None:
        out = _empty_heads(packed, heads, dtype)
        packed, seen = tokens(packed, packed.ndim - 1, heads, head_dim)
        run(cpu.Tokens(*seen), packed.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out
    values = packed[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
    # A copy: as a view the scales need not start at a multiple of four bytes.
    scales = packed[..., heads * head_dim :].clone(memory_format=torch.contiguous_format).view(torch.float32)[..., None]
    return dequantized(values.view(torch.float8_e4m3fn), scales).to(dtype).contiguous()


library = torch.library.Library("cachedit_fx", "FRAGMENT")
"""Graphs will hold these two between collectives, as `torch.ops.cachedit_fx.*`."""
library.define("quant_fp8(Tensor x) -> Tensor")
library.impl("quant_fp8", quant_fp8, "CompositeExplicitAutograd")
library.define("dequant_fp8(Tensor packed, int heads, ScalarType dtype) -> Tensor")
library.impl("dequant_fp8", dequant_fp8, "CompositeExplicitAutograd")


@torch.library.register_fake("cachedit_fx::quant_fp8")
def _(x):
    return _empty_packed(x)


@torch.library.register_fake("cachedit_fx::dequant_fp8")
def _(packed, heads, dtype):
    return _empty_heads(packed, heads, dtype)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: the values of `x` as float8_e4m3fn, and the scales [..., 1] of its heads."""
    x = x.float()
    size = x.abs()
    amax = torch.where(size < math.inf, size, 0).amax(-1, keepdim=True).clamp_(min=SMALLEST_AMAX)
    # A number over a tensor would be its reciprocal times the number: two roundings.
    values = (x * (torch.full_like(amax, LARGEST) / amax)).clamp_(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), amax / LARGEST


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The reference: float32 of what `quantized` gives."""
    return values.float() * scales
