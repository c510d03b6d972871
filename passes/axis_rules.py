"""Says how a node runs on parts of its inputs, from shapes alone: the rules for data movement and pointwise work.

    add(x cut, y whole)      y is cut as x is                 ->  cut
    reshape(x cut, sizes)    the axis must stay recognisable  ->  cut, perhaps along another axis
    x[:, 64:]                at the border of a segment       ->  cut, the later segments
    anything else            None: its inputs are gathered    ->  whole

A rule looks at one node, at the layouts of its inputs and at sizes. It returns a `Step`, or None if it knows no way. So
a graph is right whatever operations it has, and a missing rule costs communication only. `axis_rules_compute` has the
rules for products, norms, reductions and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from cachedit_fx import collectives

from .graph_aliases import arguments_of, overloads_of
from .graph_values import input_nodes, target_name, tensor_of, value_of
from .layouts import Cut, Layout, Size, hints_of, regrouped, simplified, size_of, unit_for


@dataclass(frozen=True)
class As:
    """An argument of a step: a node's value in some layout.

    Attributes:
        by_rank: cuts of sequences that other values have: the value's axes are put into the order of these, rank by
            rank.
    """

    node: fx.Node
    layout: Any
    by_rank: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Step:
    """How a node runs on parts.

    Attributes:
        target: what is called in place of the node's target; None keeps it.
        args, kwargs: with `As` in place of nodes.
        made: the layout of the value that the call returns; a tuple of layouts for a tuple.
        handed_on: the layout in which later nodes find it, if another one.
        is_partial: whether the ranks' values must be summed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: Any = None
    target: Callable[..., Any] | None = None
    handed_on: Any = field(default=None)
    is_partial: bool = False

    @property
    def reads(self) -> list[As]:
        """The arguments, in order."""
        found: list[As] = []
        map_arguments((self.args, self.kwargs), lambda each: found.append(each) or each)  # type: ignore[func-returns-value]
        return found

    @property
    def result(self) -> Any:
        """The layout of the node's value for later nodes."""
        return self.made if self.handed_on is None else self.handed_on


def map_arguments(arguments: Any, function: Callable[[As], Any]) -> Any:
    """`arguments` with `function` applied to each `As`."""
    if isinstance(arguments, As):
        return function(arguments)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(map_arguments(each, function) for each in arguments)
    if isinstance(arguments, Mapping):
        return {name: map_arguments(each, function) for name, each in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(map_arguments(each, function) for each in (arguments.start, arguments.stop, arguments.step)))
    return arguments


class Wish(NamedTuple):
    """An axis of this length should have a border of segments somewhere, or whole units on each rank."""

    length: Size
    border: Size | None = None
    unit: Size = 1


class Call:
    """A node as rules see it.

    Args:
        node: of the flat graph.
        layouts: node -> layout of its value; nodes that are missing are whole.
        ranks: how many ranks share the work.
        equal: symbol -> the size that it is known to equal.

    Attributes:
        wishes: how the node would like an axis cut, if it is not cut so.
    """

    def __init__(
        self, node: fx.Node, layouts: Mapping[fx.Node, Any], ranks: int, equal: Mapping[Any, Size] | None = None
    ) -> None:
        self.node, self.layouts, self.ranks, self.equal = node, layouts, ranks, equal or {}
        self.wishes: list[Wish] = []

    def layout(self, value: Any) -> Any:
        """The layout of an argument; None if it is whole or no node."""
        return self.layouts.get(value) if isinstance(value, fx.Node) else None

    def sizes(self, value: Any) -> list[Size] | None:
        """The sizes of an argument's whole value, or of the node's; None if it is no tensor."""
        tensor = tensor_of(value) if isinstance(value, fx.Node) else None
        return None if tensor is None else self.all_sizes(tensor)

    def all_sizes(self, tensor: torch.Tensor) -> list[Size]:
        """The sizes of a tensor, equal symbols made one."""
        sizes = [size_of(size) for size in tensor.shape]
        return [self.resolved(size) for size in sizes] if self.equal else sizes

    def resolved(self, size: Size) -> Size:
        """A size with equal symbols made one."""
        return size if isinstance(size, int) else simplified(size.xreplace(self.equal))

    def number(self, value: Any) -> Size | None:
        """An argument that is a whole number, or a node that is one, as a size."""
        number = value_of(value) if isinstance(value, fx.Node) else value
        is_number = isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)
        return self.resolved(size_of(number)) if is_number else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Parameter -> argument."""
        return arguments_of(self.node)

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)

    @property
    def cuts(self) -> list[tuple[fx.Node, Cut]]:
        """The inputs that are cut, in order."""
        pairs = ((each, self.layouts.get(each)) for each in input_nodes(self.node))
        return [(each, layout) for each, layout in pairs if isinstance(layout, Cut)]

    def step(self, made: Any, layouts: Mapping[Any, Any], **changes: Any) -> Step:
        """A step in which inputs come in these layouts, and all others whole."""
        arguments = self.node.args, dict(self.node.kwargs)
        args, kwargs = map_aggregate(
            arguments, lambda each: As(each, layouts.get(each)) if isinstance(each, fx.Node) else each
        )
        return replace(Step(_mutable(args), _mutable(kwargs), made), **changes)


def _mutable(arguments: Any) -> Any:
    """Arguments in plain containers: FX's own do not hold what is no argument of a node."""
    if isinstance(arguments, As):
        return arguments
    if isinstance(arguments, tuple):
        return tuple(map(_mutable, arguments))
    if isinstance(arguments, list):
        return [_mutable(each) for each in arguments]
    if isinstance(arguments, dict):
        return {name: _mutable(each) for name, each in arguments.items()}
    return arguments


Rule = Callable[[Call], "Step | None"]
RULES: dict[str, Rule] = {}
"""Name of an operation -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of the operations of these names."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def rule_of(node: fx.Node) -> Rule | None:
    """The node's rule; None if it has none."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = target_name(node)
    if name in RULES:
        return RULES[name]
    return pointwise if _is_pointwise(node, name) else None


def positive(axis: int, rank: int) -> int:
    """An axis counted from the first."""
    return axis + rank if axis < 0 else axis


# ---------------------------------------------------------------------------------------------------------------------
# Pointwise work
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
_POINTWISE_NAMES = frozenset({
    "truediv", "floordiv", "floor_divide", "invert", "and_", "or_", "xor", "not_", "to", "float", "half", "bfloat16",
    "double", "bool", "long", "int", "type", "contiguous", "detach", "dropout", "dropout_", "alias", "hardswish",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "real", "imag", "complex",
    "polar", "requires_grad_", "normalize_", "iadd", "isub", "imul", "itruediv", "silu", "relu6", "hardtanh", "mod",
    "matmul_", "copy_", "fill_", "zero_", "clip", "_get_data_attr", "type_as", "feature_dropout", "alpha_dropout",
})
# fmt: on
_READ_FOR_FORM = frozenset({"type_as", "to"})


def _is_pointwise(node: fx.Node, name: str) -> bool:
    """Whether each element of the result depends on the same element of the inputs, broadcast to one shape."""
    if name in _POINTWISE_NAMES:
        return True
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    packet = getattr(torch.ops.aten, plain, None) if plain and not plain.startswith("__") else None
    overloads = overloads_of(node.target) or (
        [getattr(packet, each) for each in packet.overloads()] if isinstance(packet, torch._ops.OpOverloadPacket) else []
    )
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def pointwise(call: Call) -> Step | None:
    """Operands are broadcast to the result's shape; those that have the axis are cut there."""
    result = call.sizes(call.node)
    operands = [each for each in call.node.all_input_nodes if tensor_of(each) is not None]
    if target_name(call.node) in _READ_FOR_FORM:
        operands = operands[:1]
    if result is None or any(isinstance(call.layout(each), tuple) for each in operands):
        return None
    for operand, cut in call.cuts:
        sizes = call.sizes(operand)
        if operand in operands and sizes is not None and len(sizes) <= len(result):
            return _broadcast(call, cut.at(cut.axis + len(result) - len(sizes)), result, operands)
    others = {each: call.layout(each) for each in call.node.all_input_nodes}
    return call.step(None, others)  # only the form of a cut value is read


def _broadcast(call: Call, cut: Cut, result: Sequence[Size], operands: Sequence[fx.Node]) -> Step | None:
    layouts: dict[fx.Node, Layout] = {each: call.layout(each) for each in call.node.all_input_nodes}
    if result[cut.axis] == 1:
        return None
    for operand in operands:
        sizes = call.sizes(operand)
        assert sizes is not None
        layouts[operand] = operand_layout(cut, sizes, len(result))
    return call.step(cut, layouts)


def operand_layout(cut: Cut, sizes: Sequence[Size], rank: int) -> Layout:
    """The layout of an operand with these sizes, which is broadcast to a result of `rank` axes with this cut."""
    axis = cut.axis - (rank - len(sizes))
    return cut.at(axis) if axis >= 0 and sizes[axis] != 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


def source_of(call: Call) -> tuple[fx.Node, Cut, list[Size]] | None:
    """The first argument, its cut and its sizes, if it is the only input that is cut."""
    value, layout = call.first, call.layout(call.first)
    sizes = call.sizes(value)
    if not isinstance(layout, Cut) or sizes is None or any(each is not value for each, _ in call.cuts):
        return None
    return value, layout, sizes


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as")
def reshape(call: Call) -> Step | None:
    """The cut follows the axis into the result. Sizes in the arguments are those of the whole, so -1 takes their place."""
    source = source_of(call)
    before, after = tensor_of(call.first), tensor_of(call.node)
    if source is None or before is None or after is None or before.dtype is not after.dtype:
        return None
    value, cut, sizes = source
    result = call.all_sizes(after)
    new = regrouped(cut, sizes, result, (hints_of(before), hints_of(after)))
    if new is None:
        call.wishes.append(Wish(cut.length, unit=unit_for(cut, sizes, result)))
        return None
    if target_name(call.node) in ("squeeze", "unsqueeze"):
        return call.step(new, {value: cut})
    arguments = [*_given_sizes(call.node, after)]
    arguments[new.axis] = -1
    return Step((As(value, cut), tuple(arguments)), {}, new, _reshape_of(call.node))


def _reshape_of(node: fx.Node) -> Callable[..., Any]:
    return torch.Tensor.view if target_name(node) in ("view", "view_as") else torch.Tensor.reshape


def _given_sizes(node: fx.Node, result: torch.Tensor) -> list[Any]:
    """The sizes of the result, as arguments: symbols as the nodes that the call names them by."""
    given = [each for argument in node.args[1:] for each in (argument if isinstance(argument, (list, tuple)) else [argument])]
    if target_name(node) in ("view", "reshape") and len(given) == result.dim() and not node.kwargs:
        sizes = [As(each, None) if isinstance(each, fx.Node) else each for each in given]
        return [size if each == -1 else each for each, size in zip(sizes, result.shape, strict=True)]
    return list(result.shape)


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "adjoint")
def permute(call: Call) -> Step | None:
    """The cut follows the axis."""
    source = source_of(call)
    if source is None:
        return None
    value, cut, sizes = source
    rank = len(sizes)
    order = torch.empty((1,) * rank, device="meta").as_strided((1,) * rank, tuple(range(rank)))
    moved: torch.Tensor
    if call.node.op == "call_method":
        moved = getattr(order, str(call.node.target))(*call.node.args[1:], **call.node.kwargs)
    else:
        others = {name: each for name, each in call.node.kwargs.items() if each is not value}
        moved = call.node.target(order, *call.node.args[1:], **others)  # type: ignore[operator]
    return call.step(cut.at(moved.stride().index(cut.axis)), {value: cut})


@rule("getattr")
def attribute(call: Call) -> Step | None:
    """Transposed views, and what does not depend on the axis' length."""
    name, layout = call.node.args[1], call.layout(call.first)
    sizes = call.sizes(call.first)
    if name in ("T", "mT") and isinstance(layout, Cut) and sizes is not None:
        last = len(sizes) - 1
        swapped = {last: last - 1, last - 1: last}.get(layout.axis, layout.axis)
        return call.step(layout.at(swapped), {call.first: layout}) if last == 1 or name == "mT" else None
    if name in ("dtype", "device", "ndim", "is_cuda", "layout"):
        return call.step(None, {call.first: layout})
    if name == "shape" and isinstance(layout, Cut):
        return whole_size(call)
    return None


@rule("dim", "ndimension", "sym_storage_offset", "is_floating_point", "is_complex", "get_device", "element_size")
def form(call: Call) -> Step | None:
    """What does not depend on the axis' length."""
    return call.step(None, {call.first: call.layout(call.first)})


@rule("size", "sym_size")
def whole_size(call: Call) -> Step | None:
    """Sizes are those of the whole value."""
    layout = call.layout(call.first)
    if not isinstance(layout, Cut):
        return None
    axis = [*call.node.args[1:], *call.node.kwargs.values(), None][0] if target_name(call.node) != "getattr" else None
    return Step((As(call.first, layout), layout.axis, layout.segments, axis), {}, None, collectives.whole_size)


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def expand(call: Call) -> Step | None:
    """Other axes are repeated."""
    source, result = source_of(call), call.sizes(call.node)
    if source is None or result is None:
        return None
    value, cut, sizes = source
    axis = cut.axis + len(result) - len(sizes)
    if result[axis] != sizes[cut.axis]:
        return None
    if target_name(call.node) in ("repeat", "tile"):
        return call.step(cut.at(axis), {value: cut})
    tensor = tensor_of(call.node)
    assert tensor is not None
    given: list[Any] = list(tensor.shape)
    given[axis] = -1
    return Step((As(value, cut), tuple(given)), {}, cut.at(axis), torch.Tensor.expand)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Step | None:
    """Along another axis; along the axis itself, each unit becomes longer."""
    source = source_of(call)
    given = [*call.node.args[1:3], *call.node.kwargs.values()]
    if source is None or len(given) < 2 or not all(isinstance(each, int) for each in given[:2]):
        return None
    value, cut, sizes = source
    repeats, axis = given[0], call.node.kwargs.get("dim", given[1])
    if positive(axis, len(sizes)) != cut.axis:
        return call.step(cut, {value: cut})
    return call.step(
        replace(cut, segments=tuple(replace(s, unit=simplified(s.unit * repeats)) for s in cut.segments)), {value: cut}
    )


@rule("view_as_complex", "view_as_real")
def view_as_numbers(call: Call) -> Step | None:
    """The last axis becomes a part of each number, or the other way round."""
    source, result = source_of(call), call.sizes(call.node)
    if source is None or result is None:
        return None
    value, cut, _ = source
    return call.step(cut, {value: cut}) if cut.axis < len(result) and result[cut.axis] == cut.length else None


# ---------------------------------------------------------------------------------------------------------------------
# Joining and taking apart
# ---------------------------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def join(call: Call) -> Step | None:
    """Along the axis: segments one after the other. Along another one: all are cut at the same places."""
    tensors = call.first
    sizes = call.sizes(call.node)
    if target_name(call.node) in ("hstack", "vstack") or not isinstance(tensors, (list, tuple)) or sizes is None:
        return None
    given = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("dim", call.node.kwargs.get("axis", 0))
    joined = positive(given if isinstance(given, int) else 0, len(sizes))
    _, cut = call.cuts[0]
    if target_name(call.node) == "stack":
        return call.step(cut.at(cut.axis + (joined <= cut.axis)), dict.fromkeys(tensors, cut))
    if joined != cut.axis:
        return call.step(cut, dict.fromkeys(tensors, cut))
    parts = {each: _part_along(call, each, cut.axis) for each in tensors}
    if any(part is None for part in parts.values()):
        return None
    segments = tuple(segment for each in tensors for segment in parts[each].segments)  # type: ignore[union-attr]
    return call.step(Cut(cut.axis, segments), parts)


def _part_along(call: Call, value: Any, axis: int) -> Layout:
    """The layout of one of the values that are joined along `axis`: as it is cut already, else as one segment."""
    layout, sizes = call.layout(value), call.sizes(value)
    if isinstance(layout, Cut) and layout.axis == axis:
        return layout
    return Cut.along(axis, sizes[axis]) if sizes is not None and axis < len(sizes) else None


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split")
def take_apart(call: Call) -> Step | None:
    """Along another axis, or along the axis at borders of its segments."""
    source, results = source_of(call), value_of(call.node)
    if source is None or not isinstance(results, (list, tuple)):
        return None
    value, cut, sizes = source
    is_unbind = target_name(call.node) == "unbind"
    place = 1 if is_unbind else 2
    given = call.node.args[place] if len(call.node.args) > place else call.node.kwargs.get("dim", 0)
    axis = positive(given if isinstance(given, int) else 0, len(sizes))
    if axis != cut.axis:
        return call.step((cut.at(cut.axis - (is_unbind and axis < cut.axis)),) * len(results), {value: cut})
    if is_unbind:
        return None
    start: Size = 0
    ranges: list[tuple[int, int]] = []
    for part in results:
        end = simplified(start + call.resolved(size_of(part.shape[axis])))
        found = _range_of(call, cut, start, end)
        if found is not None:
            ranges.append(found)
        start = end
    if len(ranges) < len(results):
        return None
    made = tuple(Cut(axis, cut.segments[first:last]) for first, last in ranges)
    return Step((As(value, cut), axis, cut.segments, tuple(ranges)), {}, made, collectives.split_segments)


def _range_of(call: Call, cut: Cut, start: Size, end: Size) -> tuple[int, int] | None:
    """The segments that make up [start, end); a wish if the borders are inside segments."""
    found = cut.between(start, end)
    if found is None:
        call.wishes += [Wish(cut.length, border) for border in (start, end)]
    return found


@rule("narrow", "select")
def narrow(call: Call) -> Step | None:
    """As the slices and indices that they stand for."""
    source = source_of(call)
    arguments = list(call.arguments.values())
    if source is None or len(arguments) < 3 or not isinstance(arguments[1], int):
        return None
    value, cut, sizes = source
    axis, start = positive(arguments[1], len(sizes)), arguments[2]
    if axis != cut.axis:
        is_select = target_name(call.node) == "select"
        return call.step(cut.at(cut.axis - (is_select and axis < cut.axis)), {value: cut})
    begin, length = call.number(start), call.number(arguments[3]) if len(arguments) > 3 else None
    found = _range_of(call, cut, begin, simplified(begin + length)) if begin is not None and length is not None else None
    return _segments(call, value, cut, found) if found is not None else None


def _segments(call: Call, value: fx.Node, cut: Cut, found: tuple[int, int]) -> Step:
    first, last = found
    made = Cut(cut.axis, cut.segments[first:last])
    return Step((As(value, cut), cut.axis, cut.segments, first, last), {}, made, collectives.take_segments)


@rule("getitem")
def getitem(call: Call) -> Step | None:
    """An element of a tuple; or slices and indices of a tensor."""
    value, index = call.node.args
    layout = call.layout(value)
    if isinstance(layout, tuple):
        return call.step(layout[index], {value: layout}) if isinstance(index, int) else None
    source = source_of(call)
    indexed = _indexed(call, source[1], source[2], index) if source is not None else None
    if source is None or indexed is None:
        return None
    value, cut, _ = source
    if indexed.range is None:
        return call.step(cut.at(indexed.axis), {value: cut})
    return _segments(call, value, cut, indexed.range) if indexed.is_only else None


class _Indexed(NamedTuple):
    """Where the axis is in the result; the range of segments that is taken of it; whether nothing else is indexed."""

    axis: int
    range: tuple[int, int] | None
    is_only: bool


def _indexed(call: Call, cut: Cut, sizes: Sequence[Size], index: Any) -> _Indexed | None:
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(entry, (fx.Node, list, tuple, bool)) and call.number(entry) is None for entry in entries):
        return None
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (len(sizes) - consumed)
    else:
        entries += [slice(None)] * (len(sizes) - consumed)
    axis = position = 0
    taken: tuple[int, int] | None = None
    is_only = True
    at: int | None = None
    for entry in entries:
        if entry is None:
            position, is_only = position + 1, False
            continue
        if isinstance(entry, slice) and axis == cut.axis:
            at, is_all = position, _is_all(entry)
            taken = None if is_all else _slice_range(call, cut, entry)
            if not is_all and taken is None:
                return None
        elif not isinstance(entry, slice) and axis == cut.axis:
            return None
        else:
            is_only &= isinstance(entry, slice) and _is_all(entry)
        position += isinstance(entry, slice)
        axis += 1
    return _Indexed(at, taken, is_only) if at is not None else None


def _is_all(entry: slice) -> bool:
    return entry.start in (None, 0) and entry.stop is None and entry.step in (None, 1)


def _slice_range(call: Call, cut: Cut, entry: slice) -> tuple[int, int] | None:
    if entry.step not in (None, 1):
        return None
    borders: list[Size] = []
    for value, default in ((entry.start, 0), (entry.stop, cut.length)):
        number = default if value is None else call.number(value)
        if number is None:
            return None
        if isinstance(number, int) and isinstance(cut.length, int):
            number = min(max(number + cut.length if number < 0 else number, 0), cut.length)
        elif number not in cut.borders:
            number = simplified(cut.length + number)  # counted from the end
        borders.append(number)
    return _range_of(call, cut, borders[0], borders[1])


@rule("setitem")
def setitem(call: Call) -> Step | None:
    """A write to the whole of the axis, or to segments of it: the value is cut as the target is."""
    target, index, value = call.node.args
    cut, sizes = call.layout(target), call.sizes(target)
    if not isinstance(cut, Cut) or sizes is None or not isinstance(target, fx.Node):
        return None
    indexed = _indexed(call, cut, sizes, index)
    if indexed is None or not (indexed.range is None or indexed.is_only):
        return None
    layouts: dict[Any, Layout] = {target: cut}
    part = cut.at(indexed.axis) if indexed.range is None else Cut(indexed.axis, cut.segments[slice(*indexed.range)])
    written = call.sizes(value)
    if written is not None:
        layouts[value] = operand_layout(part, written, len(_result_sizes(tensor_of(target), index)))
    if indexed.range is None:
        return call.step(cut, layouts)
    first, last = indexed.range
    written_value = As(value, layouts[value]) if isinstance(value, fx.Node) else value
    args = As(target, cut), written_value, cut.axis, cut.segments, first, last
    return Step(args, {}, None, collectives.write_segments_)


def _result_sizes(tensor: torch.Tensor | None, index: Any) -> Sequence[Any]:
    """The sizes of tensor[index], sizes of slices aside."""
    assert tensor is not None
    plain = torch.empty((1,) * tensor.dim(), device="meta")
    entries = index if isinstance(index, tuple) else (index,)
    return plain[tuple(slice(None) if isinstance(e, slice) else 0 if isinstance(e, int) else e for e in entries)].shape


@rule("pad")
def pad(call: Call) -> Step | None:
    """Other axes are padded."""
    source, result = source_of(call), call.sizes(call.node)
    pads = call.arguments.get("pad")
    if source is None or result is None or not isinstance(pads, (list, tuple)):
        return None
    value, cut, sizes = source
    first = 2 * (len(sizes) - 1 - cut.axis)
    is_free = all(each == 0 for each in pads[first : first + 2])
    return call.step(cut, {value: cut}) if is_free and call.arguments.get("mode", "constant") == "constant" else None
