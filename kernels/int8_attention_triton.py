"""The Triton kernel of `int8_attention`, on keys that `int8_keys_triton` has put in eight bits.

A head's columns are one or two parts, each a power of two: 96 are 64 and 32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .int8_attention import FLOATS, LOG2_E, UNIT, WIDE_HEAD_DIM, empty_out
from .int8_keys_triton import (
    FP8_TARGETS,
    NVIDIA_TARGETS,
    PARTS,
    STRIDE_UNIT,
    TILE_ROWS,
    jit,
    quantize,
    sizes,
    strides,
    to_int8,
    units_of,
)
from .layout import NUM_WARPS
from .layout_triton import device_of
from .variants import TYPES, Loop, Variant

_LOG2_E = tl.constexpr(LOG2_E)
_FP8_LOG2 = tl.constexpr(8.0)
"""Weights in eight bits go up to 2^8, so that small ones are not lost."""


@jit
def _bias(mask_ptrs, there):
    """What a mask adds to exponents of two. The lowest number stays finite: a row of it has equal weights."""
    mask = tl.load(mask_ptrs, there, other=0)
    if mask.dtype == tl.uint8:
        return tl.where(mask != 0, 0.0, float("-inf"))
    mask = mask.to(tl.float32)
    return tl.where(mask == float("-inf"), mask, tl.maximum(mask * _LOG2_E, -3e38))


@jit
def _query_part(x_ptr, rows, row_stride, n_rows, head_units, scale, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    cols = FIRST + tl.arange(0, BLOCK)[None, :]
    mask = (rows[:, None] < n_rows) & (cols < head_units * STRIDE_UNIT)
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * row_stride * STRIDE_UNIT + cols, mask, other=0.0)
    return x.to(tl.float32) * scale


@jit
def _add_values(
    acc,
    p,
    value_ptr,
    value_row_stride,
    n_rows,
    head_units,
    IS_CHECKED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc + p times one part of a tile of values.

    Rows that there are none of have no weight, and columns are not stored: others are read in their place. e4m3 values
    are transposed, and padded to whole tiles and parts.
    """
    rows, cols = tl.arange(0, p.shape[1]), FIRST + tl.arange(0, BLOCK)
    if value_ptr.dtype.element_ty == tl.float8e4nv:
        value = tl.load(value_ptr + cols[None, :] * value_row_stride + rows[:, None])
    else:
        if IS_CHECKED:
            rows = tl.minimum(rows, n_rows - 1)
        cols = tl.where(cols < head_units * STRIDE_UNIT, cols, 0)
        cols = tl.max_contiguous(tl.multiple_of(cols, STRIDE_UNIT), STRIDE_UNIT)
        value = tl.load(value_ptr + rows[:, None] * value_row_stride + cols[None, :])
    return tl.dot(p.to(value.dtype), value, acc)


@jit
def _add_tiles(
    state,
    query,
    query_scale,
    codes_ptr,
    scales_ptr,
    value_ptr,
    value_row_stride,
    mask_ptr,
    mask_row_stride,
    rows,
    n_rows,
    length,
    head_units,
    first,
    last,
    IS_CAUSAL: tl.constexpr,
    IS_CHECKED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """The tiles of keys from `first` to `last`. Only checked ones end, or cross the diagonal."""
    acc_1, acc_2, total, top = state
    q_1, q_2 = query
    cols = tl.arange(0, BLOCK_N)
    IS_FP8: tl.constexpr = value_ptr.dtype.element_ty == tl.float8e4nv
    lift: tl.constexpr = _FP8_LOG2 if IS_FP8 else 0.0
    codes_ptr += first.to(tl.int64) * (BLOCK_1 + BLOCK_2)
    codes_at = cols[None, :] * (BLOCK_1 + BLOCK_2) + tl.arange(0, BLOCK_1)[:, None]
    value_ptr += first if IS_FP8 else first.to(tl.int64) * value_row_stride
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if IS_CHECKED else None):
        products = tl.dot(q_1, tl.load(codes_ptr + codes_at), out_dtype=tl.int32)
        if BLOCK_2:
            codes_at_2 = cols[None, :] * (BLOCK_1 + BLOCK_2) + BLOCK_1 + tl.arange(0, BLOCK_2)[:, None]
            codes = tl.load(codes_ptr + codes_at_2)
            products = tl.dot(q_2, codes, products, out_dtype=tl.int32)
        key_scale = tl.load(scales_ptr + start // TILE_ROWS)
        x = products.to(tl.float32)
        if IS_CHECKED or mask_ptr is not None:
            bias = tl.zeros((BLOCK_N,), tl.float32)
            if IS_CHECKED:
                bias = tl.where(cols < length - start, 0.0, float("-inf"))
            if mask_ptr is not None and not HAS_ROWS:
                bias += _bias(mask_ptr + start + cols, cols < length - start)
            x = x * (query_scale[:, None] * key_scale) + bias[None, :]
            if HAS_ROWS:
                there = (rows[:, None] < n_rows) & (cols[None, :] < length - start)
                at = tl.arange(0, x.shape[0])[:, None] * mask_row_stride + cols[None, :]
                x += _bias(mask_ptr + start + at, there)
            if IS_CAUSAL:
                x = tl.where(rows[:, None] >= start + cols[None, :], x, float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(x - (base - lift)[:, None])
        else:
            # Scales are positive: one product for the maximum, one multiplication and subtraction in one for the rest.
            new_top = tl.maximum(top, tl.max(x, 1) * key_scale * query_scale)
            base = new_top
            p = tl.exp2(x * (query_scale[:, None] * key_scale) - (base - lift)[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        total = total * decay + tl.sum(p, 1)
        left = length - start
        acc_1 = _add_values(
            acc_1 * decay[:, None],
            p,
            value_ptr,
            value_row_stride,
            left,
            head_units,
            IS_CHECKED,
            0,
            BLOCK_1,
        )
        if BLOCK_2:
            acc_2 = _add_values(
                acc_2 * decay[:, None],
                p,
                value_ptr,
                value_row_stride,
                left,
                head_units,
                IS_CHECKED,
                BLOCK_1,
                BLOCK_2,
            )
        codes_ptr += BLOCK_N * (BLOCK_1 + BLOCK_2)
        value_ptr += BLOCK_N if IS_FP8 else BLOCK_N * value_row_stride
    return acc_1, acc_2, total, top


@jit
def _store_part(
    out_ptr,
    acc,
    value_scales_ptr,
    total,
    rows,
    row_stride,
    n_rows,
    head_units,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = FIRST + tl.arange(0, BLOCK)[None, :]
    acc = acc / total[:, None]
    if value_scales_ptr is not None:
        acc *= tl.load(value_scales_ptr + cols)
    mask = (rows[:, None] < n_rows) & (cols < head_units * STRIDE_UNIT)
    at = rows.to(tl.int64)[:, None] * row_stride * STRIDE_UNIT + cols
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask)


@jit
def _attend(
    query_ptr,
    codes_ptr,
    scales_ptr,
    value_ptr,
    value_scales_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    group,
    n_rows,
    length,
    head_units,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    IS_CAUSAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """`BLOCK_M` rows of a head against all its keys."""
    tile, number = tl.program_id(0), tl.program_id(1)
    batch, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    key_head = batch * (heads // group) + head // group
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_tiles = tl.cdiv(length, TILE_ROWS)
    N_COLS: tl.constexpr = BLOCK_1 + BLOCK_2
    query_ptr += (batch * query_batch_stride + head * query_head_stride) * STRIDE_UNIT
    codes_ptr += key_head * n_tiles * TILE_ROWS * N_COLS
    scales_ptr += key_head * n_tiles
    if value_scales_ptr is None:
        value_ptr += (batch * value_batch_stride + head // group * value_head_stride) * STRIDE_UNIT
        value_row_stride *= STRIDE_UNIT
    else:
        value_row_stride = n_tiles * TILE_ROWS  # of transposed ones
        value_ptr += key_head * N_COLS * value_row_stride
        value_scales_ptr += key_head * N_COLS
    if mask_ptr is not None:
        first = (tile * BLOCK_M).to(tl.int64)
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride + first * mask_row_stride

    x_1 = _query_part(query_ptr, rows, query_row_stride, n_rows, head_units, scale, 0, BLOCK_1)
    amax = tl.max(sizes(x_1), 1)
    x_2, q_2, acc_2 = 0, 0, 0
    if BLOCK_2:
        x_2 = _query_part(query_ptr, rows, query_row_stride, n_rows, head_units, scale, BLOCK_1, BLOCK_2)
        amax = tl.maximum(amax, tl.max(sizes(x_2), 1))
        acc_2 = tl.zeros((BLOCK_M, BLOCK_2), tl.float32)
    amax = tl.maximum(amax, 1e-30)
    factor = 127.0 / amax
    q_1 = to_int8(x_1 * factor[:, None])
    if BLOCK_2:
        q_2 = to_int8(x_2 * factor[:, None])
    query_scale = amax / 127.0

    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = (tl.zeros((BLOCK_M, BLOCK_1), tl.float32), acc_2, total, top)
    last, whole = length, length // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        last = tl.minimum(last, (tile + 1) * BLOCK_M)
        whole = tl.minimum(whole, tile * BLOCK_M)
    for IS_CHECKED in tl.static_range(2):
        state = _add_tiles(
            state,
            (q_1, q_2),
            query_scale,
            codes_ptr,
            scales_ptr,
            value_ptr,
            value_row_stride,
            mask_ptr,
            mask_row_stride,
            rows,
            n_rows,
            length,
            head_units,
            whole if IS_CHECKED else whole * 0,
            last if IS_CHECKED else whole,
            IS_CAUSAL,
            IS_CHECKED,
            HAS_ROWS,
            32 if IS_CHECKED else BLOCK_N,  # half a tile leaves registers for the checks
            BLOCK_1,
            BLOCK_2,
        )
    acc_1, acc_2, total, top = state
    LIFT: tl.constexpr = 0.0 if value_scales_ptr is None else _FP8_LOG2
    lse = (top + tl.log2(total) - LIFT) / _LOG2_E
    total = tl.where(total == 0, 1.0, total)
    tl.store(lse_ptr + number.to(tl.int64) * n_rows + rows, lse, rows < n_rows)
    out_ptr += (batch * n_rows * heads + head) * head_units * STRIDE_UNIT
    row_stride = heads * head_units
    _store_part(out_ptr, acc_1, value_scales_ptr, total, rows, row_stride, n_rows, head_units, 0, BLOCK_1)
    if BLOCK_2:
        _store_part(out_ptr, acc_2, value_scales_ptr, total, rows, row_stride, n_rows, head_units, BLOCK_1, BLOCK_2)


class Blocks(NamedTuple):
    """Rows of queries and of keys in a program's tiles, their columns in two parts, and the stages of its loop."""

    rows: int
    key_rows: int
    part_1: int
    part_2: int
    stages: int

    @property
    def cols(self) -> int:
        return self.part_1 + self.part_2


def blocks(head_dim: int, mask: str, is_amd: bool, fp8: bool) -> Blocks:
    """What the registers and the shared memory of all GPUs of a kind have room for.

    Compute capability 10.0 spills most easily: it limits the stages.

    Args:
        mask: "none", "keys" for one of keys or a diagonal, or "pairs" for one of queries and keys.
        fp8: whether values are in e4m3.
    """
    parts = next(parts for parts in PARTS if head_dim <= sum(parts))
    stages = 1 if sum(parts) > (96 if fp8 else 128) and not is_amd else 2
    if parts == PARTS[-1] or mask == "pairs":
        return Blocks(64, 32, *parts, stages)
    if is_amd or mask == "keys":
        return Blocks(128, 32, *parts, stages)
    return Blocks(128, 64, *parts, stages if stages == 1 or parts == PARTS[1] else 3)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied first if its rows are not adjacent elements that start at multiples of 16 bytes."""
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % UNIT for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    fp8_values: bool = False,
) -> Any:
    """As `int8_attention`, by the kernels above."""
    batch, heads, n_rows, head_dim = query.shape
    key_heads, length = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = empty_out(query), query.new_empty((batch, heads, n_rows), dtype=torch.float32)
    if not out.numel():
        return (out, lse) if return_lse else out
    query, key, value = map(aligned, (query, key, value))
    mask, mask_strides = _mask_rows(attn_mask)
    kind = "pairs" if mask_strides[-1] else "none" if mask is None and not is_causal else "keys"
    size = blocks(head_dim, kind, torch.version.hip is not None, fp8_values)
    with device_of(query):
        packed = quantize(key, value if fp8_values else None, size.cols)
        if packed.value_codes is not None:
            value = packed.value_codes.view(batch, key_heads, size.cols, -1)
        _attend[(-(-n_rows // size.rows), batch * heads)](
            query,
            packed.codes,
            packed.scales,
            value,
            packed.value_scales,
            mask,
            out,
            lse,
            scale * LOG2_E,
            heads,
            heads // key_heads,
            n_rows,
            length,
            head_dim // UNIT,
            *units_of(query),
            *units_of(value),
            *mask_strides,
            IS_CAUSAL=is_causal,
            HAS_ROWS=kind == "pairs",
            BLOCK_M=size.rows,
            BLOCK_N=size.key_rows,
            BLOCK_1=size.part_1,
            BLOCK_2=size.part_2,
            num_warps=NUM_WARPS,
            num_stages=size.stages,
        )
    if not return_lse:
        return out
    mean = packed.sums.sum(1)[:, :head_dim].view(batch, key_heads, head_dim, 1) / length
    shift = query.float() @ mean.repeat_interleave(heads // key_heads, 1)
    return out, lse.add_(shift.squeeze(-1), alpha=scale)


def _mask_rows(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """The mask, and its strides from sample to sample, head to head and row to row: 0 if one is for all."""
    if mask is None:
        return None, (0, 0, 0)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    mask = mask[(None,) * (4 - mask.ndim)]
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return mask.view(torch.uint8) if mask.dtype is torch.bool else mask, tuple(strides[:3])


AMD_TARGETS = frozenset({"gfx942"})


def variants() -> Iterator[Variant]:
    """Every specialisation that the launchers can choose. All inputs but masks are aligned."""
    for dtype, cols in itertools.product(FLOATS, map(sum, PARTS)):
        for is_amd, fp8 in ((False, False), (True, False), (False, True)):
            if not fp8 or cols <= WIDE_HEAD_DIM:
                yield from _attending(dtype, cols, is_amd, fp8)


def _attending(dtype: torch.dtype, cols: int, is_amd: bool, fp8: bool) -> Iterator[Variant]:
    kind = TYPES[dtype]
    values = 1 if fp8 else dtype.itemsize
    forms: list[tuple[str, torch.dtype | None, str]] = [("", None, "none"), (", causal", None, "keys")]
    for element, text in ((torch.uint8, "bool"), (dtype, kind)) if cols <= WIDE_HEAD_DIM else ():
        forms += [(f", {text} mask of {of}", element, of) for of in ("keys", "pairs")]
    for text, mask, of in forms:
        size = blocks(cols, of, is_amd, fp8)
        tiles = [size.key_rows * part * width for width in (1, values) for part in (size.part_1, size.part_2) if part]
        masked = 0 if mask is None else size.key_rows * mask.itemsize * (size.rows if of == "pairs" else 1)
        yield Variant(
            _attend,
            f"int8_attention {kind}, heads of {cols}{', e4m3 values' if fp8 else ''}{text}{', AMD' if is_amd else ''}",
            {
                "query_ptr": f"*{kind}",
                "codes_ptr": "*i8",
                "scales_ptr": "*fp32",
                "value_ptr": "*fp8e4nv" if fp8 else f"*{kind}",
                "value_scales_ptr": "*fp32" if fp8 else None,
                "mask_ptr": None if mask is None else f"*{TYPES[mask]}",
                "out_ptr": f"*{kind}",
                "lse_ptr": "*fp32",
                "scale": "fp32",
                **dict.fromkeys(("heads", "group", "n_rows", "length", "head_units"), "i32"),
                **dict.fromkeys(strides("query", "value", "mask"), "i32"),
                **dict.fromkeys(("IS_CAUSAL", "HAS_ROWS", "BLOCK_M", "BLOCK_N", "BLOCK_1", "BLOCK_2"), "constexpr"),
            },
            {
                "IS_CAUSAL": text == ", causal",
                "HAS_ROWS": of == "pairs",
                "BLOCK_M": size.rows,
                "BLOCK_N": size.key_rows,
                "BLOCK_1": size.part_1,
                "BLOCK_2": size.part_2,
            },
            read_bytes=0,
            written_bytes=size.rows * size.cols * dtype.itemsize,
            written_once=size.rows * 4,
            loop=Loop(tuple(tiles), masked, 4, ("int8", "fp8" if fp8 else kind)),
            num_warps=NUM_WARPS,
            num_stages=size.stages,
            targets=FP8_TARGETS if fp8 else AMD_TARGETS if is_amd else NVIDIA_TARGETS,
            unaligned=frozenset({"mask_ptr"}),
        )
