"""Eight-bit queries, keys and values for the all-to-all of sequence parallelism, which is bound by the bytes it sends.

    amax  = max(|x| over the finite elements of a token's head, 2^-100)
    scale = amax / 448                  value = e4m3(x * (448 / amax))                  x ~ value * scale

    [..., heads, head_dim]  ->  uint8 [..., heads * head_dim values | heads float32 scales]

A scale travels in the row of its token, after the values: one message. Rows stay multiples of 16 bytes if `heads` is
a multiple of 4 and `head_dim` of 16. The view that an all-to-all sends ([world, batch, sequence, heads / world,
head_dim], permuted) is read without a copy, and so is the view that it received.

Values round to nearest, ties to even, saturate at +-448, infinities too, and stay NaN. Both conversions work on bits:
they need no fp8 unit, so compute capability 7.5 runs them, and gfx942, whose own format has another bias.
"""

from __future__ import annotations

import math

import torch

from . import cpu
from .layout import runs_on_triton, tokens_of

LARGEST = 448.0
"""The largest finite e4m3 value. The Triton kernels, which cannot read globals, spell this and the next out."""
SMALLEST_AMAX = 2.0**-100
"""Keeps 0/0 apart from a number: zeros give zeros."""
SCALE_BYTES = 4
TILE = 4096
"""Elements of a tile: sixteen a thread, whose bytes are one store of 128 bits (AMD: eight a thread, 64 bits)."""
BLOCKS = (64, 128, 256)
"""Columns of a tile; a head is as wide as the widest at most, else torch's ops take it."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _row_bytes(heads: int, head_dim: int) -> int:
    return heads * (head_dim + SCALE_BYTES)


def _head_dim(packed: torch.Tensor, heads: int) -> int:
    return packed.shape[-1] // heads - SCALE_BYTES


def empty_packed(x: torch.Tensor) -> torch.Tensor:
    """Memory for what `quant_fp8` returns."""
    *leading, heads, head_dim = x.shape
    return torch.empty((*leading, _row_bytes(heads, head_dim)), dtype=torch.uint8, device=x.device)


def empty_heads(packed: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
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
        from .quant_fp8_triton import launch_quant

        return launch_quant(x)
    packed = empty_packed(x)
    run = cpu.loop("quant_fp8", (x,), x.dtype)
    if run is not None:
        x, tokens = tokens_of(x, x.ndim - 2, heads, head_dim)
        threads = torch.get_num_threads()
        run(cpu.Tokens(*tokens), x.data_ptr(), x.stride(-2), packed.data_ptr(), packed.shape[-1], threads)
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
        from .quant_fp8_triton import launch_dequant

        return launch_dequant(packed, heads, dtype)
    run = cpu.loop("dequant_fp8", (packed,), dtype)
    if run is not None:
        out = empty_heads(packed, heads, dtype)
        packed, tokens = tokens_of(packed, packed.ndim - 1, heads, head_dim)
        run(cpu.Tokens(*tokens), packed.data_ptr(), out.data_ptr(), torch.get_num_threads())
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
    return empty_packed(x)


@torch.library.register_fake("cachedit_fx::dequant_fp8")
def _(packed, heads, dtype):
    return empty_heads(packed, heads, dtype)


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
