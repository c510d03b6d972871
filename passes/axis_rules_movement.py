"""Says how operations that only move numbers run on parts: reshapes, transpositions, joining and taking apart.

x.view(1, 1024, 24, 128)     cut along tokens   ->   x.view(1, -1, 24, 128)
cat([text, image], 1)        both cut           ->   cut, segments (64, 960)
x[:, 64:]                    segments (64, 960) ->   take_segments(x, 1, segments, 1, 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from cachedit_fx import collectives

from .axis_rules import As, Call, Step, Wish, operand_layout, positive, rule
from .graph_values import tensor_of, value_of
from .layouts import Cut, Size, hints_of, product, regrouped, simplified, unit_for

# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as")
def reshape(call: Call) -> Step | None:
    """The cut follows the axis into the result. Sizes that the call gives are those of the whole, so one becomes -1."""
    before, after = tensor_of(call.first), tensor_of(call.node)
    if call.source is None or before is None or after is None or before.dtype is not after.dtype:
        return None
    value, cut, sizes = call.source
    result = call.all_sizes(after)
    new = regrouped(cut, sizes, result, (hints_of(before), hints_of(after)))
    if new is None:
        call.wishes.append(Wish(cut.length, unit=unit_for(cut, sizes, result)))
        return None
    arguments = _sizes_of_result(call, after)
    arguments[new.axis] = -1
    target = torch.Tensor.view if call.name in ("view", "view_as") else torch.Tensor.reshape
    return Step((As(value, cut), tuple(arguments)), {}, new, target)


def _sizes_of_result(call: Call, result: torch.Tensor) -> list[Any]:
    """The sizes of the result, those that the call gives as it gives them: a symbol has a node there."""
    given = call.node.args[1:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    if call.name not in ("view", "reshape") or len(given) != result.dim():
        return list(result.shape)
    sizes = zip(given, result.shape, strict=True)
    return [As(each, None) if isinstance(each, fx.Node) else size for each, size in sizes]


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint")
def permute(call: Call) -> Step | None:
    """The cut follows the axis: the operation tells where, on a tensor whose strides are the numbers of its axes."""
    if call.source is None:
        return None
    value, cut, sizes = call.source
    axes = torch.empty((1,) * len(sizes), device="meta").as_strided((1,) * len(sizes), tuple(range(len(sizes))))
    function: Any = getattr(axes, str(call.node.target)) if call.node.op == "call_method" else call.node.target
    positional = call.node.args[1:] if call.node.op == "call_method" else (axes, *call.node.args[1:])
    moved = function(*positional, **call.node.kwargs)
    return call.step(cut.at(moved.stride().index(cut.axis)), {value: cut})


@rule("getattr")
def attribute(call: Call) -> Step | None:
    """Transposed views, sizes, and what is the same on all ranks."""
    name = call.node.args[1]
    if name in ("T", "mT") and call.source is not None:
        value, cut, sizes = call.source
        last = len(sizes) - 1
        swapped = {last: last - 1, last - 1: last}.get(cut.axis, cut.axis)
        return call.step(cut.at(swapped), {value: cut}) if last == 1 or name == "mT" else None
    if name == "shape":
        return whole_size(call)
    return call.same_step() if name in ("dtype", "device", "ndim", "is_cuda", "layout") else None


@rule("dim", "ndimension", "is_floating_point", "is_complex", "get_device", "element_size", "sym_storage_offset")
def form(call: Call) -> Step | None:
    """What does not depend on the axis' length; of an offset only the sign matters."""
    return call.same_step()


@rule("size", "sym_size")
def whole_size(call: Call) -> Step | None:
    """Sizes are those of the whole value."""
    if call.source is None:
        return None
    value, cut, sizes = call.source
    asked = None if call.name == "getattr" else call.argument(1, "dim")
    asked = positive(asked, len(sizes)) if isinstance(asked, int) else None
    return Step((As(value, cut), cut.axis, cut.segments, asked), {}, None, collectives.whole_size)


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def expand(call: Call) -> Step | None:
    """Other axes are repeated."""
    result = tensor_of(call.node)
    if call.source is None or result is None:
        return None
    value, cut, sizes = call.source
    made = cut.at(cut.axis + result.dim() - len(sizes))
    if call.all_sizes(result)[made.axis] != sizes[cut.axis]:
        return None
    if call.name in ("repeat", "tile"):
        return call.step(made, {value: cut})
    arguments: list[Any] = list(result.shape)
    arguments[made.axis] = -1
    return Step((As(value, cut), tuple(arguments)), {}, made, torch.Tensor.expand)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Step | None:
    """Along another axis; along the axis itself, units become longer."""
    repeats, axis = call.argument(1, "repeats"), call.argument(2, "dim")
    if call.source is None or not isinstance(repeats, int) or not isinstance(axis, int):
        return None
    value, cut, sizes = call.source
    if positive(axis, len(sizes)) == cut.axis:
        longer = tuple(replace(segment, unit=product((segment.unit, repeats))) for segment in cut.segments)
        return call.step(replace(cut, segments=longer), {value: cut})
    return call.step(cut, {value: cut})


@rule("view_as_complex", "view_as_real")
def view_as_numbers(call: Call) -> Step | None:
    """The last axis becomes a part of each number, or the other way round."""
    result = call.sizes(call.node)
    if call.source is None or result is None:
        return None
    value, cut, sizes = call.source
    return call.step(cut, {value: cut}) if cut.axis < min(len(sizes), len(result)) else None


@rule("pad")
def pad(call: Call) -> Step | None:
    """Other axes are padded."""
    pads, mode = call.argument(1, "pad"), call.argument(2, "mode", default="constant")
    if call.source is None or not isinstance(pads, (list, tuple)) or mode != "constant":
        return None
    value, cut, sizes = call.source
    first = 2 * (len(sizes) - 1 - cut.axis)
    return call.step(cut, {value: cut}) if all(each == 0 for each in pads[first : first + 2]) else None


# ---------------------------------------------------------------------------------------------------------------------
# Joining and taking apart
# ---------------------------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate", "stack")
def join(call: Call) -> Step | None:
    """Along the axis: segments one after the other. Along another one: all are cut at the same places."""
    tensors, axis, sizes = call.first, call.argument(1, "dim", "axis", default=0), call.sizes(call.node)
    if not isinstance(tensors, (list, tuple)) or not isinstance(axis, int) or sizes is None or not call.cuts:
        return None
    joined, (_, cut) = positive(axis, len(sizes)), call.cuts[0]
    if call.name == "stack":
        return call.step(cut.at(cut.axis + (joined <= cut.axis)), dict.fromkeys(tensors, cut))
    if joined != cut.axis:
        return call.step(cut, dict.fromkeys(tensors, cut))
    parts = [_part_along(call, each, cut.axis) for each in tensors]
    segments = tuple(segment for part in parts for segment in part.segments)
    return call.step(Cut(cut.axis, segments), dict(zip(tensors, parts, strict=True)))


def _part_along(call: Call, value: fx.Node, axis: int) -> Cut:
    """The layout of one of the values that are joined along `axis`: as it is cut already, else as one segment."""
    layout, sizes = call.layout(value), call.sizes(value)
    assert sizes is not None
    return layout if isinstance(layout, Cut) and layout.axis == axis else Cut.along(axis, sizes[axis])


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def take_apart(call: Call) -> Step | None:
    """Along another axis, or along the axis at borders of its segments."""
    results, is_unbind = value_of(call.node), call.name == "unbind"
    given = call.argument(1 if is_unbind else 2, "dim", default=0)
    if call.source is None or not isinstance(results, (list, tuple)) or not isinstance(given, int):
        return None
    value, cut, sizes = call.source
    axis = positive(given, len(sizes))
    if axis != cut.axis:
        return call.step((cut.at(cut.axis - (is_unbind and axis < cut.axis)),) * len(results), {value: cut})
    if is_unbind:
        return None
    borders: list[Size] = [0]
    for part in results:
        borders.append(simplified(borders[-1] + call.all_sizes(part)[axis]))
    ranges = [_range_of(call, cut, low, high) for low, high in zip(borders, borders[1:], strict=False)]
    made = tuple(Cut(axis, cut.segments[slice(*each)]) for each in ranges if each is not None)
    if len(made) < len(results):
        return None
    return Step((As(value, cut), axis, cut.segments, tuple(ranges)), {}, made, collectives.split_segments)


@rule("narrow", "select")
def narrow(call: Call) -> Step | None:
    """As the slices and indices that they stand for."""
    given = call.argument(1, "dim")
    start, length = call.number(call.argument(2, "start", "index")), call.number(call.argument(3, "length"))
    if call.source is None or not isinstance(given, int):
        return None
    value, cut, sizes = call.source
    axis = positive(given, len(sizes))
    if axis != cut.axis:
        return call.step(cut.at(cut.axis - (call.name == "select" and axis < cut.axis)), {value: cut})
    if start is None or length is None:
        return None
    taken = _range_of(call, cut, start, simplified(start + length))
    return _take(value, cut, taken) if taken is not None else None


@rule("getitem")
def getitem(call: Call) -> Step | None:
    """An element of a tuple; or slices and indices of a tensor."""
    value, index = call.node.args
    layout = call.layout(value)
    if isinstance(layout, tuple):
        return call.step(layout[index], {value: layout}) if isinstance(index, int) else None
    indexed = _indexed(call, index) if call.source is not None else None
    if indexed is None or not isinstance(value, fx.Node):
        return None
    if indexed.range is None:
        return call.step(layout.at(indexed.axis), {value: layout})
    return _take(value, layout, indexed.range) if indexed.is_only else None


@rule("setitem")
def setitem(call: Call) -> Step | None:
    """A write to the whole of the axis, or to segments of it: the value is cut as the target is."""
    target, index, value = call.node.args
    cut, tensor = call.layout(target), tensor_of(target) if isinstance(target, fx.Node) else None
    indexed = _indexed(call, index) if isinstance(cut, Cut) else None
    if indexed is None or tensor is None or not (indexed.range is None or indexed.is_only):
        return None
    written = call.sizes(value)
    part = cut.at(indexed.axis) if indexed.range is None else Cut(cut.axis, cut.segments[slice(*indexed.range)])
    layout = operand_layout(part, written, _rank_of(tensor, index)) if written is not None else None
    if indexed.range is None:
        return call.step(cut, {target: cut, value: layout})
    wrapped = As(value, layout) if isinstance(value, fx.Node) else value
    args = As(target, cut), wrapped, cut.axis, cut.segments, *indexed.range  # type: ignore[arg-type]
    return Step(args, {}, None, collectives.write_segments_)


class _Indexed(NamedTuple):
    """Where the axis is in the result; the segments that are taken of it, None for all; whether it alone is indexed."""

    axis: int
    range: tuple[int, int] | None
    is_only: bool


def _indexed(call: Call, index: Any) -> _Indexed | None:
    """What indexing does to the first argument, which is cut; None if the parts of the result are not simply parts."""
    cut, sizes = call.layout(call.first), call.sizes(call.first)
    assert sizes is not None
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(each, (fx.Node, list, tuple, bool)) and call.number(each) is None for each in entries):
        return None
    missing = [slice(None)] * (len(sizes) - sum(each is not None and each is not Ellipsis for each in entries))
    place = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[place : place + 1] = missing
    axis = position = 0
    taken: tuple[int, int] | None = None
    is_only, at = True, None
    for entry in entries:
        if entry is not None and axis == cut.axis:
            if not isinstance(entry, slice):
                return None
            at, taken = position, None if entry == slice(None) else _slice_range(call, cut, entry)
            if taken is None and entry != slice(None):
                return None
        else:
            is_only &= entry == slice(None)
        position += entry is None or isinstance(entry, slice)
        axis += entry is not None
    return _Indexed(at, taken, is_only) if at is not None else None


def _slice_range(call: Call, cut: Cut, entry: slice) -> tuple[int, int] | None:
    """The segments that a slice takes."""
    borders: list[Size] = []
    for value, default in ((entry.start, 0), (entry.stop, cut.length)):
        number = default if value is None else call.number(value)
        if number is None or entry.step not in (None, 1):
            return None
        if isinstance(number, int) and isinstance(cut.length, int):
            number = min(max(number + cut.length if number < 0 else number, 0), cut.length)
        elif number not in cut.borders:
            number = simplified(cut.length + number)  # counted from the end
        borders.append(number)
    return _range_of(call, cut, borders[0], borders[1])


def _range_of(call: Call, cut: Cut, start: Size, end: Size) -> tuple[int, int] | None:
    """The segments that make up [start, end); a wish if the borders are inside segments."""
    taken = cut.between(start, end)
    if taken is None:
        call.wishes += [Wish(cut.length, border) for border in (start, end)]
    return taken


def _take(value: fx.Node, cut: Cut, taken: tuple[int, int]) -> Step:
    made = Cut(cut.axis, cut.segments[slice(*taken)])
    return Step((As(value, cut), cut.axis, cut.segments, *taken), {}, made, collectives.take_segments)


def _rank_of(tensor: torch.Tensor, index: Any) -> int:
    """The number of axes of tensor[index]."""
    entries: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    return tensor.dim() + sum(each is None for each in entries) - sum(isinstance(e, (int, fx.Node)) for e in entries)
