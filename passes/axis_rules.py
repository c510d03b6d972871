"""Says how a node runs on parts of its inputs, from shapes alone. This file has what rules are made of.

    add(x cut, y whole)      y is cut as x is                 ->  cut
    reshape(x cut, sizes)    the axis must stay recognisable  ->  cut, perhaps along another axis
    x[:, 64:]                at the border of a segment       ->  cut, the later segments
    anything else            None: its inputs are gathered    ->  whole

A rule looks at one node, at the layouts of its inputs and at sizes. It returns a `Step`, or None if it knows no way. So
a graph is right whatever operations it has, and a missing rule costs communication only. The rules themselves are in
`axis_rules_movement` and `axis_rules_compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from .graph_aliases import arguments_of, overloads_of
from .graph_values import input_nodes, target_name, tensor_of, value_of
from .layouts import Cut, Layout, Size, simplified, size_of


@dataclass(frozen=True)
class As:
    """An argument of a step: a node's value in some layout.

    Attributes:
        layout: for a tuple, a tuple of layouts.
        in_any_order: whether an axis that becomes whole may be in the order of the ranks' parts.
        orders: cuts of other values. The value's axes are put into the order in which the parts of these, side by side,
            have them.
    """

    node: fx.Node
    layout: Any
    in_any_order: bool = False
    orders: tuple[Cut, ...] = ()

    def moves(self, layout: Any) -> tuple[Move, ...]:
        """The communication that brings a value into this layout from another one."""
        wanted = self.layout
        if layout == wanted:
            return ()
        if layout is None or wanted is None:
            return (Move.GATHER if wanted is None else Move.CUT,)
        is_one_run = len(layout.segments) == len(wanted.segments) == 1 and layout.is_of_ulysses == wanted.is_of_ulysses
        if layout.axis != wanted.axis and (self.in_any_order or is_one_run):
            return (Move.EXCHANGE,)
        return Move.GATHER, Move.CUT


class Move(Enum):
    """A way to change how a value is spread; see `cachedit_fx.collectives`."""

    CUT = auto()
    GATHER = auto()
    EXCHANGE = auto()


@dataclass(frozen=True)
class Step:
    """How a node runs on parts.

    Attributes:
        args, kwargs: with `As` in place of nodes.
        made: the layout of the value that the call returns; a tuple of layouts for a tuple.
        target: the function that is called in place of the node's target; None keeps it.
        handed_on: the layout in which later nodes find the value, if it is exchanged.
        is_partial: whether the ranks' values are summed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: Any = None
    target: Callable[..., Any] | None = None
    handed_on: Cut | None = None
    is_partial: bool = False

    @property
    def reads(self) -> list[As]:
        """The nodes among the arguments, in order."""
        reads: list[As] = []
        map_arguments((self.args, self.kwargs), reads.append)
        return reads

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
    """An axis of this length should have a border between segments, or be cut in longer units."""

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
        ring: how many of them pass keys and values around; the ranks at one place of the ring exchange heads.

    Attributes:
        name: of the operation.
        wishes: how the node would like an axis cut that is cut otherwise.
    """

    def __init__(
        self,
        node: fx.Node,
        layouts: Mapping[fx.Node, Any],
        ranks: int,
        equal: Mapping[Any, Size] | None = None,
        ring: int = 1,
    ) -> None:
        self.node, self.layouts, self.ranks, self.equal, self.ring = node, layouts, ranks, equal or {}, ring
        self.name = target_name(node)
        self.wishes: list[Wish] = []

    @property
    def arguments(self) -> dict[str, Any]:
        """Parameter -> argument."""
        return arguments_of(self.node)

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)

    def argument(self, place: int, *names: str, default: Any = None) -> Any:
        """The argument at this place, or under one of these names. For operations whose signature varies."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    def layout(self, value: Any) -> Any:
        """The layout of an argument; None if it is whole or no node."""
        return self.layouts.get(value) if isinstance(value, fx.Node) else None

    @property
    def cuts(self) -> list[tuple[fx.Node, Cut]]:
        """The inputs that are cut, in order."""
        pairs = ((each, self.layouts.get(each)) for each in input_nodes(self.node))
        return [(each, layout) for each, layout in pairs if isinstance(layout, Cut)]

    @property
    def source(self) -> tuple[fx.Node, Cut, list[Size]] | None:
        """The first argument, its cut and its sizes, if it is the only input that is cut."""
        layout, sizes = self.layout(self.first), self.sizes(self.first)
        if not isinstance(layout, Cut) or sizes is None or any(each is not self.first for each, _ in self.cuts):
            return None
        return self.first, layout, sizes

    def sizes(self, value: Any) -> list[Size] | None:
        """The sizes of a node's whole value; None if it is no tensor."""
        tensor = tensor_of(value) if isinstance(value, fx.Node) else None
        return None if tensor is None else self.all_sizes(tensor)

    def all_sizes(self, tensor: torch.Tensor) -> list[Size]:
        """The sizes of a tensor, equal symbols made one."""
        return [self._resolved(size_of(size)) for size in tensor.shape]

    def number(self, value: Any) -> Size | None:
        """An argument that is a whole number, or a node that is one, as a size."""
        number = value_of(value) if isinstance(value, fx.Node) else value
        is_number = isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)
        return self._resolved(size_of(number)) if is_number else None

    def _resolved(self, size: Size) -> Size:
        return size if isinstance(size, int) or not self.equal else simplified(size.xreplace(self.equal))

    def step(self, made: Any, layouts: Mapping[Any, Any], **changes: Any) -> Step:
        """A step in which inputs come in these layouts, and all others whole."""

        def wrapped(value: Any) -> Any:
            return As(value, layouts.get(value)) if isinstance(value, fx.Node) else value

        mapped: Any = map_aggregate((self.node.args, self.node.kwargs), wrapped)
        args, kwargs = _in_plain_containers(mapped)
        return replace(Step(args, kwargs, made), **changes)

    def same_step(self) -> Step:
        """A step that reads each input as it is, and makes what is the same on all ranks."""
        return self.step(None, self.layouts)


def _in_plain_containers(arguments: Any) -> Any:
    """Arguments without FX's own containers, which hold nothing but arguments of nodes."""
    if isinstance(arguments, (tuple, list)):
        container = list if isinstance(arguments, list) else tuple
        return container(map(_in_plain_containers, arguments))
    if isinstance(arguments, Mapping):
        return {name: _in_plain_containers(each) for name, each in arguments.items()}
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
_POINTWISE_NAMES = frozenset({  # beside those that torch tags as pointwise
    "truediv", "floordiv", "floor_divide", "mod", "invert", "and_", "or_", "xor", "not_", "iadd", "isub", "imul",
    "itruediv", "to", "type", "type_as", "float", "half", "bfloat16", "double", "bool", "long", "int", "contiguous",
    "detach", "alias", "dropout", "zeros_like", "ones_like", "empty_like", "full_like", "copy_", "fill_", "zero_",
    "clip", "hardswish", "relu6", "hardtanh", "real", "imag", "complex", "polar",
})
# fmt: on
_FORM_OF_SECOND = frozenset({"type_as", "to"})


def _is_pointwise(node: fx.Node, name: str) -> bool:
    """Whether each element of the result depends on the same element of the inputs, broadcast to one shape."""
    if name in _POINTWISE_NAMES:
        return True
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    packet = getattr(torch.ops.aten, plain, None) if plain and not plain.startswith("__") else None
    is_packet = isinstance(packet, torch._ops.OpOverloadPacket)
    known = [getattr(packet, each) for each in packet.overloads()] if packet is not None and is_packet else []
    return any(torch.Tag.pointwise in overload.tags for overload in overloads_of(node.target) or known)


def pointwise(call: Call) -> Step | None:
    """Operands are broadcast to the result's shape; those that have the axis are cut there."""
    operands = [each for each in call.node.all_input_nodes if tensor_of(each) is not None]
    if call.name in _FORM_OF_SECOND:
        operands = operands[:1]
    result = call.sizes(call.node)
    if result is None or any(isinstance(call.layout(each), tuple) for each in operands):
        return None
    cuts = [(each, cut) for each, cut in call.cuts if each in operands]
    if not cuts:
        return call.same_step()
    operand, cut = cuts[0]
    made = cut.at(cut.axis + len(result) - len(call.sizes(operand) or ()))
    return call.step(made, dict(call.layouts) | operand_layouts(call, made, operands, len(result)))


def operand_layouts(call: Call, cut: Cut, operands: Iterable[fx.Node], rank: int) -> dict[fx.Node, Layout]:
    """The layouts of operands that are broadcast to a result of `rank` axes that is cut so."""
    return {each: operand_layout(cut, call.sizes(each) or (), rank) for each in operands}


def operand_layout(cut: Cut, sizes: Sequence[Size], rank: int) -> Layout:
    """The layout of an operand with these sizes, which is broadcast to a result of `rank` axes that is cut so."""
    axis = cut.axis - (rank - len(sizes))
    return cut.at(axis) if axis >= 0 and sizes[axis] != 1 else None
