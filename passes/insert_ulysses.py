"""Lets ranks share the work on one sample: cuts sequences, and puts collectives around attention (Ulysses, ring).

    q = self.to_q(hidden)                       hidden_cut = cut(hidden, 1, ((1024, 1),))        once, before block 0
    y = attention(q, k, v)             ->       q = self.to_q(hidden_cut)
    out = self.proj(y)                          y = attention(exchange(q), exchange(k), exchange(v))
    ...                                         out = self.proj(exchange(y))
    output(norm_out(hidden_57))                 output(gather(norm_out(hidden_57)))

With a ring, `attention` becomes `ring_attention`: each rank keeps its queries, and keys and values pass by. It comes
alone, or between exchanges of heads.

It carries out what `infer_sequence_axes` has planned. Values from before the chain are cut at the chain's first node,
never where they are made: the prologue may still write to them. All ranks get the same graph text. What differs between
ranks is computed by the functions of `cachedit_fx.collectives` from the whole lengths. So the blocks of a graph stay
identical, and each is compiled once.

The graph's inputs and results are whole on every rank.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cachedit_fx import collectives
from cachedit_fx.ring import ring_attention

from .axis_rules import As, Move, Step, map_arguments
from .base import Facts, FlatGraph, Interface, Rewrite, Rewritten
from .block_loops import Block, Detection
from .find_timestep import TimestepSource
from .graph_aliases import memory_of
from .graph_values import body_nodes, target_name, value_of
from .infer_sequence_axes import SequenceAxes
from .layouts import Cut, Layout, Segment, Size, size_of
from .normalize import Normalized


@dataclass(frozen=True)
class ContextParallel(Interface):
    """Fact: all ranks of a group must call the graph together, with equal inputs, and get equal results.

    Attributes:
        group: its name.
        share: the share of the work of the chain's linear layers that the ranks divide, from 0 to 1.
        gathers: name of an operation of the chain -> how many values it needs whole.
        exchanges: how many values change from one cut to another, by an all-to-all each.
        in_float8: how many of them travel in eight bits.
        rings: how many calls of attention pass keys and values around.
    """

    group: str
    share: float
    gathers: Mapping[str, int]
    exchanges: int
    in_float8: int = 0
    rings: int = 0

    @property
    def note(self) -> str:
        """A sentence for people."""
        name = "ring" if self.rings and not self.exchanges else "ulysses"
        text = f"{name}: the ranks divide {self.share:.0%} of the work of the chain's linear layers"
        if self.rings:
            text += f"; keys and values of {self.rings} calls of attention pass around a ring"
        if self.in_float8:
            text += f"; {self.in_float8} of {self.exchanges} exchanges travel in eight bits"
        gathers = ", ".join(f"{name} ({count})" for name, count in self.gathers.items())
        return text + (f"; these operations need their inputs whole: {gathers}" if gathers else "")


class InsertUlysses(Rewrite):
    """Cuts the chain's streams, and inserts the collectives.

    Args:
        group: the name of the process group.
        ulysses, ring: those of its parts that exchange heads, and that pass keys and values around. Empty where there
            is one rank; without both, all ranks exchange heads.
    """

    name: ClassVar[str] = "insert_ulysses"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection, SequenceAxes)
    provides: ClassVar[tuple[type, ...]] = (ContextParallel,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, TimestepSource)

    def __init__(self, group: str, ulysses: str = "", ring: str = "") -> None:
        self.group, self.ulysses, self.ring = group, ulysses, ring

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        axes = facts[SequenceAxes]
        gathers = Counter(target_name(gather.node) for gather in axes.chain_gathers)
        self.rewrite(gm, axes, facts[Detection])
        rings = sum(step.target is ring_attention for step in axes.steps.values())
        fact = ContextParallel(self.group, axes.share, gathers, axes.exchanges, rings=rings)
        return Rewritten(gm, len(axes.steps), (fact,))

    def rewrite(self, gm: fx.GraphModule, axes: SequenceAxes, detection: Detection) -> None:
        """Carry out what was planned."""
        blocks = {node: block for loop in detection.loops for block in loop.blocks for node in block.nodes}
        _Rewriter(gm, axes, blocks, self.group, self.ulysses, self.ring).run()


class _Rewriter:
    """Rewrites one graph, in its order.

    Args:
        blocks: node -> the block that it belongs to, for nodes of blocks.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        axes: SequenceAxes,
        blocks: Mapping[fx.Node, Block],
        group: str,
        ulysses: str,
        ring: str,
    ) -> None:
        self.graph, self.axes, self.blocks = gm.graph, axes, blocks
        self.group, self.ulysses, self.ring = group, ulysses, ring
        nodes = body_nodes(gm.graph)
        self.before = {node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")}
        self.before |= set(nodes[: nodes.index(axes.entry)])
        self.values: dict[fx.Node, fx.Node] = {}
        """Node -> the node that later ones read in its place."""
        self.copies: dict[tuple[As, Block | None], fx.Node] = {}
        """(what is read, the block that reads it) -> the node that has it."""
        self.lengths = _Lengths(gm.graph, collectives.number_of_ranks(group))

    def run(self) -> None:
        layouts: dict[fx.Node, Any] = dict(self.axes.streams)
        with self.graph.inserting_before(self.axes.entry):
            for stream, cut in self.axes.streams.items():
                self.values[stream] = self._call(collectives.cut_sequence, stream, (cut,), None)
        for node, step in self.axes.steps.items():
            self._rewrite(node, step, layouts)
            layouts[node] = step.result

    def _rewrite(self, node: fx.Node, step: Step, layouts: dict[fx.Node, Any]) -> None:
        args, kwargs = map_arguments(
            (step.args, dict(step.kwargs)), lambda read: self._read(node, read, layouts.get(read.node))
        )
        if step.target is not None:
            node.op, node.target = "call_function", step.target
            if step.target in collectives.LOCAL:
                args = (*args, self.group)
            if step.target is ring_attention:
                kwargs |= {"ring": self.ring, "ulysses": self.ulysses}
        args, kwargs = self.lengths.named((args, kwargs), node)
        node.args, node.kwargs = tuple(args), kwargs
        if node.op == "output":
            return
        if step.made is not None:
            node.meta["example_value"] = fake_result(node)
        if step.is_partial:
            self._hand_on(node, collectives.sum_over_ranks, ())
        elif isinstance(step.handed_on, Cut):
            self._hand_on(node, collectives.exchange, (step.made, step.handed_on))

    def _hand_on(self, node: fx.Node, target: Callable[..., Any], cuts: tuple[Layout, ...]) -> None:
        """Put a collective after the node, and let later nodes read its value."""
        with self.graph.inserting_after(node):
            new = self._call(target, node, cuts, node)
        self.values[node] = new
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _read(self, user: fx.Node, read: As, layout: Any) -> fx.Node:
        """The node that has the value in the layout that the user reads."""
        value, moves = self.values.get(read.node, read.node), read.moves(layout)
        if not moves and not read.orders:
            return value
        is_written = not self.axes.written.isdisjoint(memory_of(read.node))
        is_early = read.node in self.before and read.node not in self.axes.streams and not is_written
        place, module = (self.axes.entry, None) if is_early else (user, user)
        key = read, self.blocks.get(place)
        if key not in self.copies or is_written:
            with self.graph.inserting_before(place):
                self.copies[key] = self._moved(value, layout, read, module)
        return self.copies[key]

    def _moved(self, value: fx.Node, layout: Layout, read: As, module: fx.Node | None) -> fx.Node:
        """The value in the layout that is read, from its present layout."""
        for move in read.moves(layout):
            if move is Move.EXCHANGE:
                value = self._call(collectives.exchange, value, (layout, read.layout), module)
            elif move is Move.GATHER:
                value = self._call(collectives.gather_sequence, value, (layout,), module)
        for order in read.orders:
            value = self._call(collectives.order_by_rank, value, (order,), module)
        is_cut = Move.CUT in read.moves(layout)
        return self._call(collectives.cut_sequence, value, (read.layout,), module) if is_cut else value

    def _call(
        self, target: Callable[..., Any], value: fx.Node, cuts: tuple[Layout, ...], module: fx.Node | None
    ) -> fx.Node:
        """A call of a function of `collectives` with these cuts, in the module that a node belongs to."""
        node = self.graph.call_function(target, (value,))
        is_of_ulysses = any(cut is not None and cut.is_of_ulysses for cut in cuts)
        groups = [self.ulysses if is_of_ulysses else self.group]
        if is_of_ulysses and target is collectives.exchange:
            groups.append(self.ring)
        node.args = (value, *self.lengths.named([part for cut in cuts for part in _along(cut)], node), *groups)
        kept = ("nn_module_stack", "stack_trace") if module is not None else ()
        node.meta = {key: module.meta[key] for key in kept if module is not None and key in module.meta}
        node.meta["example_value"] = fake_result(node)
        return node


def _along(cut: Layout) -> tuple[Any, ...]:
    assert cut is not None
    return cut.axis, cut.segments


class _Lengths:
    """Names lengths in the arguments of nodes: numbers as they are, symbols by the first nodes that have them."""

    def __init__(self, graph: fx.Graph, ranks: int) -> None:
        self.graph, self.ranks = graph, ranks
        self.sources: dict[Size, tuple[fx.Node, int | None]] = {}
        """Size -> the node that it is the value of, or the tensor that has it as the size of an axis."""
        self.nodes: dict[Size, fx.Node] = {}
        for node in graph.nodes:
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self.sources.setdefault(size_of(value), (node, None))
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    self.sources.setdefault(size_of(size), (node, axis))

    def named(self, arguments: Any, user: fx.Node) -> Any:
        """The arguments of a node, with segments as pairs, and symbols as nodes."""
        if isinstance(arguments, Segment):
            return self.named(arguments.count, user), self.named(arguments.unit, user)
        if isinstance(arguments, torch.SymInt):
            return self.named(size_of(arguments), user)
        if isinstance(arguments, sympy.Expr):
            return self._node(arguments, user)
        if isinstance(arguments, (tuple, list)):
            return type(arguments)(self.named(each, user) for each in arguments)
        if isinstance(arguments, dict):
            return {name: self.named(each, user) for name, each in arguments.items()}
        return arguments

    def _node(self, size: Size, user: fx.Node) -> fx.Node:
        if size not in self.nodes:
            source, axis = self.sources[size]
            if source is user:
                source = self._computed(size, user)
            elif axis is not None:
                with self.graph.inserting_after(source):
                    node = self.graph.call_method("size", (source, axis))
                node.meta = {"example_value": value_of(source).shape[axis]}
                source = node
            self.nodes[size] = source
            self._tell_apart(value_of(source))
        return self.nodes[size]

    def _computed(self, size: Size, user: fx.Node) -> fx.Node:
        """A length that no node before the user has, such as that of an axis which the user makes of two."""
        assert isinstance(size, sympy.Expr)
        sources = {symbol: self._node(symbol, user) for symbol in size.free_symbols}
        latest, tracer = user.prev, fx.proxy.GraphAppendingTracer(self.graph)
        with self.graph.inserting_before(user):
            proxies = {symbol: fx.Proxy(source, tracer) for symbol, source in sources.items()}
            result: fx.Node = sympy_interp(PythonReferenceAnalysis, proxies, size).node
        while (latest := latest.next) is not user:
            latest.meta["example_value"] = fake_result(latest)
        return result

    def _tell_apart(self, length: torch.SymInt) -> None:
        """Let dynamo capture anew for each length of which some rank holds one element, or none.

        Inductor's kernels for a symbolic length take it to be two at least, and were wrong for parts of one. The guards
        are equal on all ranks. They are on the symbols: with one on the length alone, torch's shapes of a part of one
        would be numbers in one block, and symbols in the next.
        """
        if has_free_unbacked_symbols(length) or length >= 2 * self.ranks:
            return
        for symbol in length.node.expr.free_symbols:
            if symbol in self.sources:
                source, axis = self.sources[symbol]
                int(value_of(source) if axis is None else value_of(source).shape[axis])
        int(length)


def fake_result(node: fx.Node) -> Any:
    """The node's value, from the recorded values of its arguments."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), value_of)
    mode = next(
        (value.fake_mode for each in node.all_input_nodes if hasattr(value := value_of(each), "fake_mode")), None
    )
    with mode if mode is not None else torch.no_grad(), torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        result = node.target(*args, **kwargs)
    return args[0] if node.target is operator.setitem else result
