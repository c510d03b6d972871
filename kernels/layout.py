"""What the kernels share: tensors as rows, and whether Triton can run.

Memory bounds every kernel: it reads each input once and writes each output once. A program works on one tile of
`BLOCK_ROWS` x `BLOCK_COLS` elements. A tensor is samples x rows x columns, with columns adjacent in memory: a slice of
a joint stream of text and image needs no copy.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed. It is imported when a kernel is first launched: see `layout_triton`."""


NUM_WARPS = 8


TILE = 2048
"""Elements of a tile: eight a thread, so that a thread's 16-bit elements are one load of 128 bits."""


def runs_on_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether all are plain tensors on a GPU that Triton has a compiler for."""
    if not HAS_TRITON:
        return False
    for x in tensors:
        if x is not None and (
            x.device.type not in ("cuda", "xpu") or type(x) not in (torch.Tensor, torch.nn.Parameter)
        ):
            return False
    return True


class Layout(NamedTuple):
    """A shape as samples x rows x columns."""

    samples: int
    rows: int
    cols: int

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a program's tile."""
        return (1, TILE) if self.rows == 1 else (8, TILE // 8)

    @property
    def tiles(self) -> int:
        """Tiles of a sample."""
        rows, cols = self.tile
        return -(-self.rows // rows) * -(-self.cols // cols)

    def strides(self, tensor: torch.Tensor | None) -> tuple[int, int]:
        """From one sample of `tensor` to the next, and from one row to the next. 0 if there is only one."""
        if tensor is None:
            return 0, 0
        if self.rows == 1 and tensor.is_contiguous():
            return (self.cols if self.samples > 1 else 0), 0
        return (tensor.stride(0) if self.samples > 1 else 0), tensor.stride(-2)


def layout(tensors: Sequence[torch.Tensor | None], per_sample: bool = False) -> Layout | None:
    """`tensors`, of one shape, as rows: their own rows, or a single row (a row a sample with `per_sample`) if all are
    contiguous. None if some must be copied first."""
    present = [tensor for tensor in tensors if tensor is not None]
    shape = present[0].shape
    if all(tensor.is_contiguous() for tensor in present):
        samples = shape[0] if per_sample and shape else 1
        return Layout(samples, 1, math.prod(shape) // max(samples, 1))
    if len(shape) not in (2, 3) or any(tensor.stride(-1) != 1 for tensor in present):
        return None
    if len(shape) == 2 and per_sample:
        return None
    return Layout(shape[0] if len(shape) == 3 else 1, shape[-2], shape[-1])


class Tokens(NamedTuple):
    """A shape [..., heads, head_dim] as rows, a token's head each, and the places of its tokens: three sizes and
    strides. Nobody needs the first size."""

    rows: int
    heads: int
    head_dim: int
    size_1: int
    size_2: int
    stride_0: int
    stride_1: int
    stride_2: int


def collapsed(tensor: torch.Tensor, dims: int) -> tuple[list[int], list[int]] | None:
    """Sizes and strides of the first `dims` dimensions as three, merged where no copy is needed; None if more stay."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    missing = 3 - len(sizes)
    return None if missing < 0 else ([1] * missing + sizes, [0] * missing + strides)


def tokens_of(
    tensor: torch.Tensor, dims: int, heads: int, head_dim: int, multiple: int = 1
) -> tuple[torch.Tensor, Tokens]:
    """The tokens of `tensor`, which its first `dims` dimensions count. `tensor` is copied first if more than three
    strides, or strides that are no multiples of `multiple`, lead to them."""
    merged = collapsed(tensor, dims) if tensor.stride(-1) == 1 else None
    if merged is None or any(stride % multiple for stride in merged[1]):
        tensor = tensor.contiguous()
        merged = collapsed(tensor, dims)
    assert merged is not None
    sizes, strides = merged
    return tensor, Tokens(math.prod(sizes) * heads, heads, head_dim, *sizes[1:], *strides)
