"""Infers along which axis each value of the chain can be cut, so that several ranks share the work on one sample.

    hidden_states  [1, 1024, 3072]      cut along axis 1                 one segment of 1024
    cat(text, hidden_states)            cut along axis 1                 segments (64, 1024)
    rotary table, mask                  whole, cut where a cut value meets it
    attention(q, k, v)                  heads are cut, tokens whole      all-to-all before and after it
    temb, modulations                   whole

Nothing here knows a model. Which axis holds the tokens is tried: for each stream that enters the chain, each of its
axes. The best choice cuts most of the work of linear layers; among equals it gathers least, then exchanges least. The
rules for single nodes are in `axis_rules`. A node without a rule gets its inputs whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import fx

from . import axis_rules_compute, axis_rules_movement  # noqa: F401 - enter their rules
from .axis_rules import Call, Move, Step, Wish, rule_of
from .base import Analysis, Facts, FlatGraph
from .block_loops import Detection
from .graph_aliases import Memory, memory_of, written_by
from .graph_cost import cost_of, hint, is_compute
from .graph_values import body_nodes, input_nodes, is_of_module, target_name, tensor_of
from .layouts import Cut, Segment, Size, simplified, size_of
from .normalize import Normalized


class Gather(NamedTuple):
    """A node that needs a value whole.

    Attributes:
        in_chain: whether the node is a part of the chain: of a block, or of what is between blocks.
    """

    node: fx.Node
    value: fx.Node
    in_chain: bool


@dataclass(frozen=True)
class SequenceAxes:
    """Fact: how the nodes from the chain's first one on run on parts.

    Attributes:
        entry: the chain's first node. Values from before it are cut there, if at all.
        streams: the values that enter the chain cut -> their layouts.
        steps: every node that reads or makes a cut value -> how it runs.
        written: memory that these nodes write to. Such values are read anew at each use.
        gathers: in graph order.
        exchanges: how many values change from one cut to another, by an all-to-all each.
        cut_flops, flops: work of the chain's linear layers on cut values, and all of it.
    """

    entry: fx.Node = field(repr=False)
    streams: Mapping[fx.Node, Cut]
    steps: Mapping[fx.Node, Step] = field(repr=False)
    written: frozenset[Memory] = field(repr=False)
    gathers: tuple[Gather, ...] = field(repr=False)
    exchanges: int
    cut_flops: int
    flops: int

    @property
    def share(self) -> float:
        """The share of the linear layers' work that the ranks divide, from 0 to 1."""
        return self.cut_flops / max(self.flops, 1)

    @property
    def chain_gathers(self) -> tuple[Gather, ...]:
        """Those in the chain."""
        return tuple(gather for gather in self.gathers if gather.in_chain)


class InferSequenceAxes(Analysis[SequenceAxes]):
    """Chooses the streams' axes, and follows the parts to the end of the graph.

    Args:
        ranks: how many share the work.
        ring: how many of them pass keys and values around.
    """

    name: ClassVar[str] = "infer_sequence_axes"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection)
    provides: ClassVar[type] = SequenceAxes
    axes: ClassVar[slice] = slice(None)
    """Those of a stream that may be cut."""

    def __init__(self, ranks: int, ring: int = 1) -> None:
        self.ranks, self.ring = ranks, ring

    def run(self, gm: fx.GraphModule, facts: Facts) -> SequenceAxes | None:
        detection = facts[Detection]
        if self.ranks < 2 or not detection.chain or facts[Normalized].impurities:
            return None
        chain = _Chain(gm, detection, self.ranks, self.ring)
        best = _Trial({}, chain)
        for stream in chain.streams:
            best = max([best, *_trials_of(stream, best, self.axes)], key=lambda trial: trial.merit)
        return self.provides(*best.findings) if best.cut_flops else None


class _Chain:
    """What all trials share: the nodes from the chain's first one on.

    Attributes:
        nodes: the last one is the output.
        end: how many of them belong to the chain.
        streams: values from before the chain that its blocks carry on; the hidden states first.
        linear: the chain's linear layers -> their work.
    """

    def __init__(self, gm: fx.GraphModule, detection: Detection, ranks: int, ring: int) -> None:
        body, loops = body_nodes(gm.graph), detection.chain_loops
        start = min(loop.start for loop in loops)
        self.ranks, self.ring = ranks, ring
        self.nodes = [*body[start:], gm.graph.output_node()]
        self.end = max(loop.end for loop in loops) - start
        self.rules = [rule_of(node) for node in self.nodes]
        hidden = [loop.carried[slot].inputs[0] for loop, slot in zip(loops, detection.hidden, strict=True)]
        carried = [value.inputs[0] for loop in loops for value in loop.carried]
        inside = set(self.nodes)
        self.streams = [value for value in dict.fromkeys([*hidden, *carried]) if value not in inside]
        self.writes = {node: targets for node in self.nodes if (targets := written_by(node))}
        self.written = frozenset(memory for to in self.writes.values() for each in to for memory in memory_of(each))
        self.linear = {node: cost_of(node) for node in self.nodes[: self.end] if _is_linear(node)}


def _is_linear(node: fx.Node) -> bool:
    """Whether the node multiplies by a weight."""
    is_product = is_compute(node) and "attention" not in target_name(node)
    return is_product and any(map(_is_weight, input_nodes(node)))


def _is_weight(node: fx.Node) -> bool:
    """Whether the node is a weight, or is made of one weight alone."""
    while node.op not in ("placeholder", "get_attr") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return is_of_module(node)


class _MustBeWhole(Exception):
    """A value that cannot be cut: it is written to in a way that no rule knows."""

    def __init__(self, value: fx.Node) -> None:
        self.value = value


class _Trial:
    """The chain's nodes run on parts, given the cuts of its streams.

    Attributes:
        streams: stream -> its cut.
        whole: nodes whose inputs are gathered, whatever the rules say.
        layouts: node -> layout of its value, if it is cut.
        equal: symbol -> the length of a cut axis that it stands for.
        wishes: of all nodes.
        steps, gathers, exchanges: see `SequenceAxes`.
    """

    def __init__(self, streams: Mapping[fx.Node, Cut], chain: _Chain) -> None:
        self.chain = chain
        self.whole: set[fx.Node] = set()
        while True:
            self.streams = {node: cut for node, cut in streams.items() if node not in self.whole}
            self.layouts: dict[fx.Node, Any] = dict(self.streams)
            self.steps: dict[fx.Node, Step] = {}
            self.gathers: list[Gather] = []
            self.exchanges = 0
            self.equal: dict[Any, Size] = {}
            self.wishes: list[Wish] = []
            try:
                self._follow()
                break
            except _MustBeWhole as error:
                memory = memory_of(error.value)
                nodes = (*chain.nodes, *chain.streams)
                self.whole |= {error.value, *(node for node in nodes if not memory.isdisjoint(memory_of(node)))}
        self.cut_flops = sum(flops for node, flops in chain.linear.items() if self._is_cut(node))

    @property
    def merit(self) -> tuple[int, ...]:
        """More is better. Among equals more streams are cut, so that the first block is like the others."""
        gathers = sum(gather.in_chain for gather in self.gathers)
        return self.cut_flops, -gathers, -self.exchanges, len(self.streams)

    @property
    def findings(self) -> tuple[Any, ...]:
        """The fields of `SequenceAxes`."""
        chain = self.chain
        work = self.cut_flops, sum(chain.linear.values())
        return chain.nodes[0], self.streams, self.steps, chain.written, tuple(self.gathers), self.exchanges, *work

    def _is_cut(self, node: fx.Node) -> bool:
        step = self.steps.get(node)
        return step is not None and (step.made is not None or step.is_partial)

    def _follow(self) -> None:
        """Find the step of each node, in graph order.

        Raises:
            _MustBeWhole: if a write would go to a copy.
        """
        for position, (node, rule) in enumerate(zip(self.chain.nodes, self.chain.rules, strict=True)):
            if all(self.layouts.get(each) is None for each in node.all_input_nodes):
                continue
            call = Call(node, self.layouts, self.chain.ranks, self.equal, self.chain.ring)
            step = rule(call) if rule is not None and node not in self.whole else None
            if step is None or self._copy_written(node, step) is not None:
                step = call.step(None, {})
            copy = self._copy_written(node, step)
            if copy is not None:
                raise _MustBeWhole(copy)
            self.wishes += call.wishes
            self._count(node, step, position < self.chain.end)
            self.steps[node] = step
            if step.result is not None:
                self.layouts[node] = step.result
                self._learn(node, step.result)

    def _copy_written(self, node: fx.Node, step: Step) -> fx.Node | None:
        """A value that the step reads a copy of, although the node, or a later one through it, writes to the value."""
        targets = self.chain.writes.get(node, ())
        for read in step.reads:
            layout = self.layouts.get(read.node)
            if layout == read.layout:
                continue
            shared = memory_of(node) & memory_of(read.node) if self.chain.written else frozenset()
            if isinstance(layout, tuple) or read.node in targets or not self.chain.written.isdisjoint(shared):
                return read.node
        return None

    def _learn(self, node: fx.Node, layout: Any) -> None:
        """Note that a symbol stands for the length of a cut axis. Dynamo makes one for each slice of unknown length."""
        tensor = tensor_of(node)
        if isinstance(layout, Cut) and tensor is not None:
            size = size_of(tensor.shape[layout.axis])
            if not isinstance(size, int) and size.is_Symbol and size != layout.length:
                self.equal[size] = layout.length

    def _count(self, node: fx.Node, step: Step, in_chain: bool) -> None:
        """Note what the step costs in communication."""
        for read in step.reads:
            moves = read.moves(self.layouts.get(read.node))
            self.exchanges += moves.count(Move.EXCHANGE)
            if Move.GATHER in moves:
                self.gathers.append(Gather(node, read.node, in_chain))
        self.exchanges += step.handed_on is not None


def _trials_of(stream: fx.Node, best: _Trial, axes: slice) -> Iterator[_Trial]:
    """The trials in which one more stream is cut, along each of these axes; and as nodes wish it, if they do."""
    chain, tensor = best.chain, tensor_of(stream)
    for axis, size in list(enumerate(map(size_of, tensor.shape) if tensor is not None else ()))[axes]:
        if isinstance(size, int) and size < chain.ranks:
            continue
        trial = _Trial(best.streams | {stream: Cut.along(axis, size)}, chain)
        yield trial
        for segments in _wished(size, trial.wishes, chain.ranks):
            yield _Trial(best.streams | {stream: Cut(axis, segments)}, chain)


def _wished(length: Size, wishes: Sequence[Wish], ranks: int) -> Iterator[tuple[Segment, ...]]:
    """The segments of an axis of this length that nodes wish for: with borders, and in longer units."""
    own = [wish for wish in wishes if wish.length == length]
    borders = dict.fromkeys(wish.border for wish in own if wish.border is not None and wish.border not in (0, length))
    if borders:
        edges = [0, *sorted(borders, key=_typical), length]
        yield tuple(Segment(simplified(high - low)) for low, high in zip(edges, edges[1:], strict=False))
    for unit in dict.fromkeys(wish.unit for wish in own if wish.unit != 1):
        if isinstance(length, int) and isinstance(unit, int) and length // unit >= ranks:
            yield (Segment(length // unit, unit),)


def _typical(size: Size) -> int:
    """A number to order sizes by."""
    return size if isinstance(size, int) else hint(size)
