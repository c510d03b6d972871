"""The Triton kernels that put keys, and values on request, in eight bits: column statistics, then codes.

Keys lie in memory as the matrix unit takes them, less their mean, padded with zeros to whole tiles and whole parts of a
head. Strides and head dims come in units of eight elements, so that Triton knows every row to start at a multiple of 16
bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .int8_attention import FLOATS, KEY_ROWS, UNIT, WIDE_HEAD_DIM
from .layout import NUM_WARPS
from .variants import TYPES, Variant

TILE_ROWS = tl.constexpr(KEY_ROWS)
STRIDE_UNIT = tl.constexpr(UNIT)
CHUNKS = 16
"""Programs that share the rows of a head in `_column_statistics`."""


_NUMBERS = ("heads", "group", "n_rows", "length", "chunk", "head_units")


def strides(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{of}_stride" for name in names for of in ("batch", "head", "row"))


jit: Any = functools.partial(
    triton.jit,
    do_not_specialize=(
        *_NUMBERS,
        "batch_stride",
        "head_stride",
        "row_stride",
        *strides("query", "key", "value", "mask"),
    ),
    do_not_specialize_on_alignment=("mask_ptr",),
)
"""`triton.jit`. No number is a reason to compile again, nor is where a mask begins."""


@jit
def to_int8(x):
    """The nearest whole number, ties to even, of float32 from -127 to 127: 1.5 * 2^23 leaves no bit for a fraction."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def sizes(x):
    """Absolute values; infinite for NaN, which maxima would drop."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@jit
def _rows_of_head(x_ptr, first, heads, batch_stride, head_stride, row_stride):
    """Where row `first` of head program_id(1) lies."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    at = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * row_stride
    return x_ptr + at * STRIDE_UNIT


@jit
def _column_statistics(
    x_ptr,
    out_ptr,
    heads,
    length,
    chunk,
    head_units,
    batch_stride,
    head_stride,
    row_stride,
    ARE_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Of `chunk` rows of a head: each column's sum, or its largest size."""
    first = tl.program_id(0) * chunk
    x_ptr = _rows_of_head(x_ptr, first, heads, batch_stride, head_stride, row_stride)
    rows, cols = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLS)[None, :]
    n_rows = tl.minimum(length - first, chunk)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        mask = (rows < n_rows - start) & (cols < head_units * STRIDE_UNIT)
        x = tl.load(x_ptr + rows * row_stride * STRIDE_UNIT + cols, mask, other=0.0).to(tl.float32)
        total = total + x if ARE_SUMS else tl.maximum(total, sizes(x))
        x_ptr += BLOCK_ROWS * row_stride * STRIDE_UNIT
    total = tl.sum(total, 0) if ARE_SUMS else tl.max(total, 0)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_COLS
    tl.store(out_ptr + at + tl.arange(0, BLOCK_COLS), total)


@jit
def _quantize(
    key_ptr,
    value_ptr,
    sums_ptr,
    sizes_ptr,
    codes_ptr,
    scales_ptr,
    value_codes_ptr,
    value_scales_ptr,
    heads,
    length,
    head_units,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    N_COLS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One tile of keys, less their mean, in int8 with its scale; the values' tile in e4m3, transposed."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, cols = tl.arange(0, TILE_ROWS)[:, None], tl.arange(0, BLOCK_COLS)
    chunks = (head * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)[:, None]) * BLOCK_COLS + cols[None, :]
    first = tile * TILE_ROWS
    n_tiles = tl.num_programs(0)
    mask = (rows < length - first) & (cols[None, :] < head_units * STRIDE_UNIT)
    stored = cols[None, :] < N_COLS
    mean = tl.sum(tl.load(sums_ptr + chunks), 0) / length
    x_ptr = _rows_of_head(key_ptr, first, heads, key_batch_stride, key_head_stride, key_row_stride)
    x = tl.load(x_ptr + rows * key_row_stride * STRIDE_UNIT + cols[None, :], mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - mean[None, :], 0.0)
    amax = tl.maximum(tl.max(sizes(x)), 1e-30)
    at = (head * n_tiles + tile) * TILE_ROWS * N_COLS
    tl.store(codes_ptr + at + rows * N_COLS + cols[None, :], to_int8(x * (127.0 / amax)), stored)
    tl.store(scales_ptr + head * n_tiles + tile, amax / 127.0)
    if value_ptr is not None:
        amax = tl.maximum(tl.max(tl.load(sizes_ptr + chunks), 0), 1e-30)
        x_ptr = _rows_of_head(value_ptr, first, heads, value_batch_stride, value_head_stride, value_row_stride)
        x = tl.load(x_ptr + rows * value_row_stride * STRIDE_UNIT + cols[None, :], mask, other=0.0).to(tl.float32)
        codes = (x * (448.0 / amax)[None, :]).to(value_codes_ptr.dtype.element_ty)
        at = (head * N_COLS + cols[None, :]) * n_tiles * TILE_ROWS + first + rows
        tl.store(value_codes_ptr + at, codes, stored)
        if tile == 0:
            tl.store(value_scales_ptr + head * N_COLS + cols, amax / 448.0, cols < N_COLS)


PARTS = ((64, 0), (64, 32), (64, 64), (128, 128))
"""Columns of a head, in two parts. One part of 128 would spill on compute capability 8.9."""


def units_of(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride // UNIT for stride in x.stride()[:-1])


class Quantized(NamedTuple):
    """Keys in eight bits, and values if asked for, padded to whole tiles and parts; a row of heads in all.

    Attributes:
        codes: int8 [heads, tiles * KEY_ROWS, columns].
        scales: float32 [heads, tiles].
        sums: float32 [heads, CHUNKS, columns or more]: what the mean is made of.
        value_codes: float8_e4m3fn [heads, columns, tiles * KEY_ROWS].
        value_scales: float32 [heads, columns].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    value_codes: torch.Tensor | None
    value_scales: torch.Tensor | None


def quantize(key: torch.Tensor, value: torch.Tensor | None, cols: int) -> Quantized:
    """The launches before attention.

    Args:
        key, value: [batch, heads, length, head_dim], aligned. Without a value nothing is in e4m3.
        cols: of a tile: the sum of one of `PARTS`.
    """
    batch, heads, length, head_dim = key.shape
    count, tiles, block_cols = batch * heads, -(-length // KEY_ROWS), triton.next_power_of_2(cols)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=key.device)
    codes, scales = empty((count, tiles * KEY_ROWS, cols), dtype=torch.int8), empty((count, tiles))
    sums = empty((count, CHUNKS, block_cols))
    largest = value_codes = value_scales = None
    if value is not None:
        largest, value_scales = torch.empty_like(sums), empty((count, cols))
        value_codes = empty((count, cols, tiles * KEY_ROWS), dtype=torch.float8_e4m3fn)
    units, all_strides = head_dim // UNIT, (*units_of(key), *units_of(key if value is None else value))
    for x, statistics in ((key, sums), (value, largest)):
        if x is not None:
            _column_statistics[(CHUNKS, count)](
                x,
                statistics,
                heads,
                length,
                -(-length // CHUNKS),
                units,
                *units_of(x),
                ARE_SUMS=statistics is sums,
                BLOCK_ROWS=KEY_ROWS,
                BLOCK_COLS=block_cols,
                num_warps=NUM_WARPS,
            )
    _quantize[(tiles, count)](
        key,
        value,
        sums,
        largest,
        codes,
        scales,
        value_codes,
        value_scales,
        heads,
        length,
        units,
        *all_strides,
        N_COLS=cols,
        BLOCK_CHUNKS=CHUNKS,
        BLOCK_COLS=block_cols,
        num_warps=NUM_WARPS,
    )
    return Quantized(codes, scales, sums, value_codes, value_scales)


NVIDIA_TARGETS = frozenset({"sm80", "sm89", "sm90", "sm100"})
FP8_TARGETS = NVIDIA_TARGETS - {"sm80"}


def variants() -> Iterator[Variant]:
    """Every specialisation that the launcher can choose. All inputs are aligned."""
    for dtype, cols, fp8 in itertools.product(FLOATS, map(sum, PARTS), (False, True)):
        if not fp8 or cols <= WIDE_HEAD_DIM:
            yield from _variants(dtype, cols, fp8)


def _variants(dtype: torch.dtype, cols: int, fp8: bool) -> Iterator[Variant]:
    """Statistics of values, and values in e4m3, go with `fp8`."""
    kind, block_cols = TYPES[dtype], triton.next_power_of_2(cols)
    tile, columns = KEY_ROWS * block_cols, CHUNKS * block_cols * 4
    targets = FP8_TARGETS if fp8 else None
    yield Variant(
        _column_statistics,
        f"int8_keys {'sizes' if fp8 else 'sums'} {kind}, heads of {cols}",
        {
            "x_ptr": f"*{kind}",
            "out_ptr": "*fp32",
            **dict.fromkeys(("heads", "length", "chunk", "head_units"), "i32"),
            **dict.fromkeys(("batch_stride", "head_stride", "row_stride"), "i32"),
            **dict.fromkeys(("ARE_SUMS", "BLOCK_ROWS", "BLOCK_COLS"), "constexpr"),
        },
        {"ARE_SUMS": not fp8, "BLOCK_ROWS": KEY_ROWS, "BLOCK_COLS": block_cols},
        read_bytes=tile * dtype.itemsize,
        written_once=block_cols * 4,
        targets=targets,
    )
    yield Variant(
        _quantize,
        f"int8_keys codes {kind}, heads of {cols}{', e4m3 values' if fp8 else ''}",
        {
            "key_ptr": f"*{kind}",
            "value_ptr": f"*{kind}" if fp8 else None,
            "sums_ptr": "*fp32",
            "sizes_ptr": "*fp32" if fp8 else None,
            "codes_ptr": "*i8",
            "scales_ptr": "*fp32",
            "value_codes_ptr": "*fp8e4nv" if fp8 else None,
            "value_scales_ptr": "*fp32" if fp8 else None,
            **dict.fromkeys(("heads", "length", "head_units", *strides("key", "value")), "i32"),
            **dict.fromkeys(("N_COLS", "BLOCK_CHUNKS", "BLOCK_COLS"), "constexpr"),
        },
        {"N_COLS": cols, "BLOCK_CHUNKS": CHUNKS, "BLOCK_COLS": block_cols},
        read_bytes=(1 + fp8) * (tile * dtype.itemsize + columns),
        written_bytes=(1 + fp8) * tile,
        written_once=4 + block_cols * 4 * fp8,
        targets=targets,
    )
