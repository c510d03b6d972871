"""What the Triton kernels share: tiles, devices, and results that share a launch.

This module and the others named `*_triton` import Triton. The public functions import them when they first launch a
kernel: the CPU build of torch comes without Triton, and a CPU needs none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .layout import Layout, layout

jit: Any = functools.partial(triton.jit, do_not_specialize=("n_rows", "starts"))
"""`triton.jit`. Counts of rows and first programs are no reason to compile again."""


@jit
def elements_of_tile(tile, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Sample, rows, columns of tile number `tile`, to be broadcast against each other, and which of them there are.

    Row and sample numbers are 64 bits wide, since offsets are made of them.
    """
    col_tiles = tl.cdiv(n_cols, BLOCK_COLS)
    tiles = tl.cdiv(n_rows, BLOCK_ROWS) * col_tiles
    sample = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    rows = ((tile // col_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    cols = ((tile % col_tiles).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    return sample, rows, cols, (rows < n_rows) & (cols < n_cols)


def device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `tensor` the current one: Triton launches there."""
    if tensor.device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    guard: AbstractContextManager[Any] = getattr(torch, tensor.device.type).device_of(tensor)
    return guard


@dataclass(frozen=True)
class Group:
    """Results that one launch writes. Only their sizes differ.

    Attributes:
        members: their places among all results.
        operands: of each member, the inputs that need not be contiguous.
        starts: the first program of each member, and the number of programs.
        geometry: rows and columns of each, then sample and row strides of each one's first operand, second, ...
        tile: rows and columns of a program's tile.
    """

    members: tuple[int, ...]
    operands: tuple[tuple[torch.Tensor | None, ...], ...]
    starts: tuple[int, ...]
    geometry: tuple[tuple[int, ...], ...]
    tile: tuple[int, int]


def launch_groups(
    outs: Sequence[torch.Tensor], operands: Sequence[Sequence[torch.Tensor | None]], limit: int
) -> Iterator[Group]:
    """Sort results into launches of `limit` at most. `outs` are contiguous; operands without rows are copied. Results
    without an element are left out."""
    classes: dict[Any, list[tuple[int, Layout, tuple[torch.Tensor | None, ...]]]] = {}
    for index, (out, inputs) in enumerate(zip(outs, operands, strict=True)):
        if not out.numel():
            continue
        view = layout((out, *inputs))
        if view is None:
            inputs = [None if x is None else x.contiguous() for x in inputs]
            view = Layout(1, 1, out.numel())
        key = view.tile, out.device, out.dtype, *(None if x is None else x.dtype for x in inputs)
        classes.setdefault(key, []).append((index, view, tuple(inputs)))
    for results in classes.values():
        for first in range(0, len(results), limit):
            members, layouts, chosen = zip(*results[first : first + limit], strict=True)
            starts = (0, *itertools.accumulate(view.samples * view.tiles for view in layouts))
            geometry = [tuple(view.rows for view in layouts), tuple(view.cols for view in layouts)]
            for place in range(len(chosen[0])):
                strides = [view.strides(inputs[place]) for view, inputs in zip(layouts, chosen, strict=True)]
                geometry += zip(*strides, strict=True)
            yield Group(members, chosen, starts, tuple(geometry), layouts[0].tile)
