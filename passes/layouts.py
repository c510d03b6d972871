"""Describes how a value is spread over ranks: whole on each, or cut along one axis. Nothing here reads a graph's nodes.

    [1, 1024, 3072]  cut along axis 1, segments (64, 960)      at 3 ranks:   22 + 320 | 21 + 320 | 21 + 320

The axis is a sequence of segments, such as text and image of a joint stream. Each segment is cut by itself: the first
ranks hold one unit more if the ranks do not divide it. So a stream can be taken apart and joined at the borders of its
segments without any communication. Ranks hold whole units, which are longer than one element if an axis has absorbed
the axes after it (frames of 64 tokens each, seen as one sequence).

Sizes are whole numbers or sympy expressions. Comparing expressions adds no guard, and works for lengths that depend on
data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import sympy
import torch

from .graph_cost import hint

Size: TypeAlias = "int | sympy.Expr"

MAX_SEGMENTS = 64
"""An axis of more segments than these counts as not cut: the parts of each would be few and small."""


def size_of(number: int | torch.SymInt) -> Size:
    """A size as a number, or as an expression of the graph's symbols."""
    return simplified(number.node.expr) if isinstance(number, torch.SymInt) else int(number)


def simplified(size: Size) -> Size:
    """One form for equal sizes."""
    if isinstance(size, int):
        return size
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_number else expanded


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes; 1 for none."""
    return simplified(math.prod(sizes))


@dataclass(frozen=True)
class Segment:
    """A run of an axis that is cut by itself: `count` units of `unit` elements each."""

    count: Size
    unit: Size = 1

    @property
    def length(self) -> Size:
        """Elements of the segment over all ranks."""
        return product((self.count, self.unit))


@dataclass(frozen=True)
class Cut:
    """A value of which each rank holds a part of one axis.

    Attributes:
        axis: counted from the first, from 0.
        segments: of the axis as a whole, in the model's order.
        rows: of scores of attention that are cut by heads: the segments of the axis that the queries were cut along.
        is_of_ulysses: whether only the ranks of Ulysses share the axis, so that the ranks of a ring have equal parts.
    """

    axis: int
    segments: tuple[Segment, ...]
    rows: tuple[Segment, ...] = field(default=(), compare=False)
    is_of_ulysses: bool = False

    @classmethod
    def along(cls, axis: int, *lengths: Size) -> Cut:
        """A cut along an axis whose segments have these lengths."""
        return cls(axis, tuple(map(Segment, lengths)))

    @property
    def length(self) -> Size:
        """Of the whole axis."""
        return simplified(sum((segment.length for segment in self.segments), 0))

    def at(self, axis: int) -> Cut:
        """The same cut, of another axis."""
        return replace(self, axis=axis)

    def between(self, start: Size, end: Size) -> tuple[int, int] | None:
        """The range of segments that makes up the elements [start, end); None if a border is inside a segment."""
        borders = self.borders
        if start not in borders or end not in borders:
            return None
        first = borders.index(start)
        return (first, borders.index(end)) if start != end else (first, first)

    @property
    def borders(self) -> list[Size]:
        """The positions at which segments begin, and the axis' end."""
        borders: list[Size] = [0]
        for segment in self.segments:
            borders.append(simplified(borders[-1] + segment.length))
        return borders


Layout: TypeAlias = "Cut | None"
"""How a value is spread: None is whole on each rank."""


def regrouped(cut: Cut, before: Sequence[Size], after: Sequence[Size], hints: tuple[Sequence[int], ...]) -> Layout:
    """The cut of a value after a reshape; None if the parts of the result are no reshapes of the parts.

    Args:
        before, after: sizes of the whole value.
        hints: typical numbers for both.
    """
    for inside, outside in _factor_groups(before, after, hints):
        if cut.axis in inside:
            axis = cut.axis - inside.start
            flat = _flattened(cut, [before[index] for index in inside], axis)
            return _unflattened(flat, [after[index] for index in outside], outside.start) if flat else None
    return None


def unit_for(cut: Cut, before: Sequence[Size], after: Sequence[Size]) -> Size:
    """The unit that would let the cut follow into a reshape that splits its axis; 1 if none would."""
    outer = product(before[: cut.axis])
    firsts = [axis for axis, size in enumerate(after) if size != 1 and product(after[:axis]) == outer]
    return (_quotient(cut.length, after[firsts[0]]) or 1) if firsts else 1


def hints_of(tensor: torch.Tensor) -> list[int]:
    """A typical number for each size of a tensor."""
    return [hint(size) for size in tensor.shape]


def _factor_groups(
    before: Sequence[Size], after: Sequence[Size], hints: tuple[Sequence[int], ...]
) -> Iterator[tuple[range, range]]:
    """The finest runs of axes, before and after a reshape, that hold the same elements."""
    i = j = 0
    while i < len(before) and j < len(after):
        starts = i, j
        i, j = i + 1, j + 1
        while product(before[starts[0] : i]) != product(after[starts[1] : j]) and (i < len(before) or j < len(after)):
            left, right = math.prod(hints[0][starts[0] : i]), math.prod(hints[1][starts[1] : j])
            if i < len(before) and (left <= right or j == len(after)):
                i += 1
            else:
                j += 1
        if i == len(before) or j == len(after):  # axes of size 1 that are left over
            i, j = len(before), len(after)
        yield range(starts[0], i), range(starts[1], j)


def _flattened(cut: Cut, sizes: Sequence[Size], axis: int) -> tuple[Segment, ...] | None:
    """The segments of all axes of `sizes` as one, of which `axis` is cut."""
    repeats, inner = product(sizes[:axis]), product(sizes[axis + 1 :])
    if not isinstance(repeats, int) or repeats * len(cut.segments) > MAX_SEGMENTS:
        return None
    return tuple(Segment(each.count, product((each.unit, inner))) for each in cut.segments) * repeats


def _unflattened(flat: tuple[Segment, ...], sizes: Sequence[Size], first: int) -> Layout:
    """The cut of one of the axes of `sizes`, the first of which is axis `first`, if they are `flat` as one."""
    for axis, size in enumerate(sizes):
        repeats, inner = product(sizes[:axis]), product(sizes[axis + 1 :])
        if size == 1 or not isinstance(repeats, int) or len(flat) % repeats:
            continue
        part = flat[: len(flat) // repeats]
        units = [_quotient(segment.unit, inner) for segment in part]
        if flat == part * repeats and all(unit is not None for unit in units):
            return Cut(first + axis, tuple(Segment(s.count, u) for s, u in zip(part, units, strict=True) if u))
    return None


def _quotient(size: Size, divisor: Size) -> Size | None:
    """size / divisor if that is a whole number for sure."""
    if size == divisor:
        return 1
    if isinstance(divisor, int) and divisor == 1:
        return size
    if isinstance(size, int) and isinstance(divisor, int) and divisor:
        return size // divisor if size % divisor == 0 else None
    quotient = sympy.cancel(size / divisor) if divisor != 0 else None
    return simplified(quotient) if quotient is not None and quotient.is_polynomial() and quotient.is_integer else None
