"""The Triton kernels of `quant_fp8` and `dequant_fp8`. Both conversions work on bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton.language as tl

from .layout import NUM_WARPS, tokens_of
from .layout_triton import device_of, jit
from .quant_fp8 import BLOCKS, FLOATS, SCALE_BYTES, TILE, empty_heads, empty_packed
from .variants import TYPES, Variant


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
    packed = empty_packed(x)
    if not x.numel():
        return packed
    x, tokens = tokens_of(x, x.ndim - 2, x.shape[-2], x.shape[-1])
    tile = _tile(tokens.head_dim)
    with device_of(x):
        _quantize[(-(-tokens.rows // tile[0]),)](
            x, packed, *tokens, x.stride(-2), packed.shape[-1], *tile, num_warps=NUM_WARPS
        )
    return packed


def launch_dequant(packed: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """As `dequant_fp8`, by the kernel above."""
    out = empty_heads(packed, heads, dtype)
    if not out.numel():
        return out
    packed, tokens = tokens_of(packed, packed.ndim - 1, heads, out.shape[-1], SCALE_BYTES)
    tile = _tile(tokens.head_dim)
    with device_of(packed):
        _dequantize[(-(-tokens.rows // tile[0]),)](packed, out, *tokens, *tile, num_warps=NUM_WARPS)
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
