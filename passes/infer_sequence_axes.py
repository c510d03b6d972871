"""Infers along which axis each value of the chain can be cut, so that several ranks share the work on one sample.

    hidden_states  [1, 1024, 3072]      cut along axis 1                 one segment of 1024
    cat(text, hidden_states)            cut along axis 1                 segments (64, 960)
    rotary table, mask                  whole, cut where a cut value meets it
    attention(q, k, v)                  heads are cut, tokens whole      all-to-all before and after it
    temb, modulations                   whole

Nothing here knows a model. Which axis holds the tokens is tried: for each stream that enters the chain, each of its
axes. The best choice cuts most of the work of linear layers; among equals it gathers least, then exchanges least. The
rules for single nodes are in `axis_rules` and `axis_rules_compute`. A node without a rule gets its inputs whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import fx

from . import axis_rules_compute  # noqa: F401 - enters its rules
from .axis_rules import Call, Step, Wish, rule_of
from .base import Analysis, Facts, FlatGraph
from .block_loops import Detection
from .graph_aliases import Memory, memory_of, written_by
from .graph_cost import cost_of, is_compute
from .graph_values import body_nodes, input_nodes, is_of_module, target_name, tensor_of
from .layouts import Cut, Segment, Size, simplified, size_of
from .normalize import Normalized


class Gather(NamedTuple):
    """A value that a node needs whole.

    Attributes:
        node: it reads the value.
        in_chain: whether the node is a part of the chain, blocks and what is between them.
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
        written: memory that the chain, or what follows it, writes to. Such values are read anew at each use.
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
        """Those in blocks and between them."""
        return tuple(gather for gather in self.gathers if gather.in_chain)


class InferSequenceAxes(Analysis[SequenceAxes]):
    """Chooses the streams' axes, and follows the parts to the end of the graph.

    Args:
        ranks: how many share the work.
    """

    name: ClassVar[str] = "infer_sequence_axes"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection)
    provides: ClassVar[type] = SequenceAxes

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def run(self, gm: fx.GraphModule, facts: Facts) -> SequenceAxes | None:
        detection = facts[Detection]
        if self.ranks < 2 or not detection.chain or facts[Normalized].impurities:
            return None
        graph = _Chain(gm, detection, self.ranks)
        best = _Trial({}, graph)
        for stream in graph.streams:
            best = max([best, *_cuts_of(stream, best, graph)], key=_Trial.merit.fget)  # type: ignore[attr-defined]
        return best.fact() if best.cut_flops else None


class _Chain:
    """What is the same for all trials: the nodes from the chain's first one on.

    Attributes:
        streams: values from before the chain that its blocks carry on; the hidden states first.
    """

    def __init__(self, gm: fx.GraphModule, detection: Detection, ranks: int) -> None:
        nodes = body_nodes(gm.graph)
        start = min(loop.start for loop in detection.chain_loops)
        self.end = max(loop.end for loop in detection.chain_loops) - start
        self.ranks = ranks
        self.nodes: list[fx.Node] = [*nodes[start:], gm.graph.output_node()]
        self.rules = [rule_of(node) for node in self.nodes]
        inside = set(self.nodes)
        loops = list(zip(detection.chain_loops, detection.hidden, strict=True))
        hidden = [loop.carried[slot].inputs[0] for loop, slot in loops]
        carried = [value.inputs[0] for loop, _ in loops for value in loop.carried]
        self.streams = [value for value in dict.fromkeys([*hidden, *carried]) if value not in inside]
        self.writes = {node: targets for node in self.nodes if (targets := written_by(node))}
        self.written = frozenset(memory for to in self.writes.values() for each in to for memory in memory_of(each))
        self.linear = {
            node: cost_of(node)
            for node in self.nodes[: self.end]
            if is_compute(node) and "attention" not in target_name(node) and any(map(_is_weight, input_nodes(node)))
        }

    def shares_written(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether the node's result names memory of the value that something writes to."""
        return bool(self.written) and not self.written.isdisjoint(memory_of(node) & memory_of(value))


def _is_weight(node: fx.Node) -> bool:
    while node.op not in ("placeholder", "get_attr") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return is_of_module(node)


def _cuts_of(stream: fx.Node, best: _Trial, graph: _Chain) -> Iterator[_Trial]:
    """The trials in which one more stream is cut, along each of its axes; and as nodes wish it, if they do."""
    tensor = tensor_of(stream)
    for axis, size in enumerate(map(size_of, tensor.shape) if tensor is not None else ()):
        if isinstance(size, int) and size < graph.ranks:
            continue
        trial = _Trial(best.streams | {stream: Cut.along(axis, size)}, graph)
        yield trial
        for segments in wished(size, trial.wishes, graph.ranks):
            yield _Trial(best.streams | {stream: Cut(axis, segments)}, graph)


def wished(length: Size, wishes: Sequence[Wish], ranks: int) -> Iterator[tuple[Segment, ...]]:
    """The segments of an axis of this length that nodes wish for: with borders, and with longer units."""
    own = [wish for wish in wishes if wish.length == length]
    places = {wish.border for wish in own if wish.border is not None} - {0, length}
    if places:
        edges = [0, *sorted(places, key=lambda place: (not isinstance(place, int), place if isinstance(place, int) else 0)), length]
        yield tuple(Segment(simplified(high - low)) for low, high in zip(edges, edges[1:], strict=False))
    for unit in {wish.unit for wish in own} - {1}:
        if isinstance(length, int) and isinstance(unit, int) and length // unit >= ranks:
            yield (Segment(length // unit, unit),)


class _MustBeWhole(Exception):
    """A value cannot be cut: it is written to in place in a way that no rule knows."""

    def __init__(self, value: fx.Node) -> None:
        self.value = value


class _Trial:
    """The chain's nodes run on parts, given the cuts of the streams.

    Attributes:
        streams: stream -> its cut.
        layouts: node -> layout of its value, if it is cut.
        steps, gathers: see `SequenceAxes`.
    """

    def __init__(self, streams: Mapping[fx.Node, Cut], graph: _Chain) -> None:
        self.streams, self.graph = dict(streams), graph
        self.whole: set[fx.Node] = set()
        """Nodes whose inputs are gathered, whatever the rules say."""
        while True:
            self.layouts: dict[fx.Node, Any] = {
                node: cut for node, cut in self.streams.items() if node not in self.whole
            }
            self.steps: dict[fx.Node, Step] = {}
            self.gathers: list[Gather] = []
            self.exchanges = 0
            self.wishes: list[Wish] = []
            self.equal: dict[Any, Size] = {}
            try:
                self._follow()
                break
            except _MustBeWhole as error:
                self.whole |= self._names_of(error.value)
        self.cut_flops = sum(flops for node, flops in graph.linear.items() if self._is_cut(node))

    @property
    def merit(self) -> tuple[int, ...]:
        """More is better. Among equals more streams are cut, so that the first block is like the others."""
        gathers = sum(gather.in_chain for gather in self.gathers)
        return self.cut_flops, -gathers, -self.exchanges, len(self.streams)

    def fact(self) -> SequenceAxes:
        return SequenceAxes(
            self.graph.nodes[0],
            {node: cut for node, cut in self.streams.items() if node not in self.whole},
            self.steps,
            self.graph.written,
            tuple(self.gathers),
            self.exchanges,
            self.cut_flops,
            sum(self.graph.linear.values()),
        )

    def _is_cut(self, node: fx.Node) -> bool:
        step = self.steps.get(node)
        return step is not None and (step.made is not None or step.is_partial)

    def _names_of(self, value: fx.Node) -> set[fx.Node]:
        memory = memory_of(value)
        return {node for node in (*self.graph.nodes, *self.streams) if not memory.isdisjoint(memory_of(node))}

    def _follow(self) -> None:
        for position, (node, rule) in enumerate(zip(self.graph.nodes, self.graph.rules, strict=True)):
            if not any(self.layouts.get(each) is not None for each in node.all_input_nodes):
                continue
            call = Call(node, self.layouts, self.graph.ranks, self.equal)
            step = rule(call) if rule is not None and node not in self.whole else None
            self.wishes += call.wishes
            if step is None or self._writes_to_copy(node, step):
                step = call.step(None, {})
            problem = self._writes_to_copy(node, step)
            if problem is not None:
                raise _MustBeWhole(problem)
            self.steps[node] = step
            if step.result is not None:
                self.layouts[node] = step.result
                self._learn(node, step.result)
            self._count(node, step, position < self.graph.end)

    def _learn(self, node: fx.Node, layout: Any) -> None:
        """Note that the symbol for the length of a cut axis equals the length of its segments."""
        tensor = tensor_of(node)
        if isinstance(layout, Cut) and tensor is not None:
            size = size_of(tensor.shape[layout.axis])
            if not isinstance(size, int) and size.is_Symbol and size != layout.length:
                self.equal[size] = layout.length

    def _writes_to_copy(self, node: fx.Node, step: Step) -> fx.Node | None:
        """A value that the node, or a later one, would write to although the step reads a copy of it."""
        targets = self.graph.writes.get(node, ())
        for read in step.reads:
            layout = self.layouts.get(read.node)
            if layout == read.layout:
                continue
            if isinstance(layout, tuple) or read.node in targets or self.graph.shares_written(node, read.node):
                return read.node
        return None

    def _count(self, node: fx.Node, step: Step, in_chain: bool) -> None:
        """Note what the step costs in communication."""
        for read in step.reads:
            layout = self.layouts.get(read.node)
            if layout is None or layout == read.layout:
                continue
            if isinstance(read.layout, Cut) and read.layout.axis != layout.axis:
                self.exchanges += 1
            else:
                self.gathers.append(Gather(node, read.node, in_chain))
        self.exchanges += step.handed_on is not None
