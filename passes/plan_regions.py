"""Decides which stretch of the chain may be bypassed, and how each value that leaves it continues one that enters.

    block 0 .. F-1 │ block F ............ N-B-1 │ block N-B .. N-1
         head      │ region: computed or bypassed │      tail

For every live-out of the region there is a *base*, what it would be if every block handed its carried values on
unchanged: block outputs are traced back to the matching block inputs, and glue between loops (streams concatenated,
sliced) is replayed; a layer between two loops that keeps the hidden states' shape counts as a block does. The residual
that is stored is live-out minus base. A live-out that continues nothing is stored whole, unless it depends on no
carried value at all: then it is hoisted out of the region and always computed.

The same tracing over the head gives the reference of the difference: r = H_F - base(H_F), which for a plain chain is
H_F - H_in.

With `to_output` the region is all that follows the head, to the end of the graph, and everything that leaves it is
stored whole; with F = 0 it is the whole graph.

With the unit "block" every block of the middle is a region of its own, and its input is compared:

    block 0 .. F-1 │ block F │ block F+1 │ ............ │ block N-B-1 │ block N-B .. N-1
         head      │ region  │ region    │ glue, region │ region      │      tail
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from cachedit_fx.config.cache import Cut
from cachedit_fx.config.options import Scope
from cachedit_fx.config.rules import OptionError

from .base import Analysis, Facts, FlatGraph
from .block_loops import Block, BlockLoop, Detection
from .graph_aliases import dependents, mutated_input, root_of
from .graph_cost import numel
from .graph_values import (
    body_nodes,
    is_weight,
    live_ins,
    live_outs,
    open_contexts,
    positions_of,
    same_kind,
    tensor_of,
)
from .trace_bases import BaseTracer, Continuation


@dataclass(frozen=True)
class RegionPlan:
    """One region of one graph.

    Attributes:
        name: `region_<k>`.
        loops: names of the loops it runs through.
        blocks: all blocks of its chain, head and tail included.
        first, last: F and B, the blocks that always run before and behind it.
        start, end: its body nodes, half-open, in graph order.
        loop: with a region for each loop, its loop's place in the chain.
        live_ins, live_outs: the values that cross its border (hoisted ones left out).
        streams: those live-ins that are carried; what is stored fits no other shapes of them.
        continued: for each live-out, whether it has a base; where False it is stored whole.
        bases: the bases of the continued live-outs, from values outside the region.
        hoisted: nodes inside [start, end) that must run before the region, whatever is decided.
        hidden_out: H_F, the hidden states behind the head; None where F is 0.
        reference: base of H_F; None where H_F continues nothing (then H_F itself is compared).
        block: the number of the one block that it is, where blocks are regions of their own; `hidden_out` is then what
            enters the block, whatever F is, and there is no `reference`.
    """

    name: str
    loops: tuple[str, ...]
    blocks: tuple[Block, ...]
    first: int
    last: int
    start: int
    end: int
    live_ins: tuple[fx.Node, ...] = field(repr=False)
    live_outs: tuple[fx.Node, ...] = field(repr=False)
    streams: tuple[fx.Node, ...] = field(repr=False)
    continued: tuple[bool, ...]
    bases: Continuation = field(repr=False)
    hoisted: tuple[fx.Node, ...] = field(repr=False)
    hidden_out: fx.Node | None = field(repr=False)
    reference: Continuation | None = field(repr=False)
    loop: int | None = None
    block: int | None = None

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def result_bytes(self) -> int:
        """Size of the results in their own dtypes, symbols replaced by their hints; what is stored is twice that."""
        tensors = [tensor for value in self.live_outs if (tensor := tensor_of(value)) is not None]
        return sum(numel(tensor) * tensor.element_size() for tensor in tensors)

    @property
    def middle(self) -> tuple[Block, ...]:
        """The blocks that it bypasses."""
        if self.block is not None:
            return (self.blocks[self.block],)
        return self.blocks[self.first : self.num_blocks - self.last]


@dataclass(frozen=True)
class RegionReport:
    """The regions, and one sentence for each that could not be had."""

    regions: tuple[RegionPlan, ...]
    refusals: tuple[str, ...]


class PlanRegions(Analysis[RegionReport]):
    """Plans the regions of the chain.

    Args:
        cuts: where the chain is cut; then, with scope "loop", where its loops are, in order, if they have cuts of their
            own. With the unit "block" every block of the middle is a region of its own, but those that the cut keeps;
            blocks are numbered over the chain, or in each loop with scope "loop".
        scope: "model" makes one region over the whole chain, "loop" one for each of its loops.
        to_output: the region runs to the end of the graph.
    """

    name: ClassVar[str] = "plan_regions"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)
    provides: ClassVar[type] = RegionReport

    def __init__(self, cuts: Sequence[Cut], scope: Scope = "model", to_output: bool = False) -> None:
        self.cut, *self.loop_cuts = cuts or [Cut(0, 0)]
        self.scope, self.to_output = scope, to_output

    def run(self, gm: fx.GraphModule, facts: Facts) -> RegionReport:
        detection = facts[Detection]
        chain = list(zip(detection.chain_loops, detection.hidden, strict=True))
        if chain and len(self.loop_cuts) > len(chain):
            raise OptionError(
                f"params_modifiers has {len(self.loop_cuts)} entries, and the chain {len(chain)} block loops: "
                f"{', '.join(loop.name for loop, _ in chain)}"
            )
        nodes = body_nodes(gm.graph)
        regions: list[RegionPlan] = []
        refusals: list[str] = []
        for index, segment in enumerate([chain] if self.scope == "model" else [[entry] for entry in chain]):
            cut = self.loop_cuts[index] if index < len(self.loop_cuts) else self.cut
            for block in _units(segment, cut):
                try:
                    region = self._region(f"region_{len(regions)}", segment, nodes, cut, block)
                    regions.append(replace(region, loop=index if self.scope == "loop" else None))
                except RegionRefused as refusal:
                    refusals.append(str(refusal))
        if chain and not regions and not refusals:
            refusals.append("non_prune_block_ids names every block that is left; leave out those that may be pruned")
        return RegionReport(tuple(regions), tuple(dict.fromkeys(refusals)))

    def _region(
        self, name: str, segment: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], cut: Cut, block: int | None
    ) -> RegionPlan:
        first, last = cut.first, cut.last
        if self.to_output:
            return _plan_to_output(name, segment, nodes, first)
        region = _plan(name, segment, nodes, first, last, block)
        if block is None and not any(region.continued) and len(segment) > 1:
            # Residuals of the bulk are worth more than whole values of everything.
            return _plan(name, [max(segment, key=lambda item: item[0].cost)], nodes, first, last)
        return region


def _units(segment: Sequence[tuple[BlockLoop, int]], cut: Cut) -> Iterable[int | None]:
    """The blocks that become regions; None stands for the middle as a whole."""
    if not segment:
        return []
    total = sum(loop.num_blocks for loop, _ in segment)
    if cut.unit == "region" or cut.first + cut.last >= total:
        return [None]  # an empty middle is refused as a whole
    return [block for block in range(cut.first, total - cut.last) if block not in cut.kept]


class RegionRefused(Exception):
    """Why there can be no region here."""


def _plan(
    name: str,
    segment: Sequence[tuple[BlockLoop, int]],
    nodes: Sequence[fx.Node],
    first: int,
    last: int,
    block: int | None = None,
) -> RegionPlan:
    loops = [loop for loop, _ in segment]
    where, blocks = _chain_of(segment, first, last)
    start = blocks[first - 1].end if first else blocks[0].start
    end = blocks[len(blocks) - last - 1].end
    if block is not None:
        start, end = blocks[block].start, blocks[block].end
    _refuse_side_effects(where, nodes, start, end)

    handed_on = _handed_on(segment)
    position = positions_of(nodes)
    streams = [v for loop in loops for carried in loop.carried for v in carried.inputs + carried.outputs]
    entering = {v for v in streams if v is not None and position.get(v, -1) < start}
    inside = nodes[start:end]
    moving = dependents(entering, inside)
    hoisted = _hoisted(inside, moving)
    kept = [node for node in inside if node not in hoisted]
    ins, outs = live_ins(kept), live_outs(kept)

    _refuse_odd_results(where, outs)
    replay = BaseTracer(handed_on, position, start, hoisted)
    continued = tuple(replay.add(value) for value in outs)
    if block is not None and not any(continued):
        raise RegionRefused(f"{where}: block {block} hands on nothing that enters it: a residual has no base")
    if block is None:
        hidden_out, reference = _compared(where, segment, nodes, first)
    else:
        hidden_out, reference = _hidden_ahead(segment, block), None
    return RegionPlan(
        name=name,
        loops=tuple(loop.name for loop in loops),
        blocks=blocks,
        first=first,
        last=last,
        start=start,
        end=end,
        live_ins=ins,
        live_outs=outs,
        streams=tuple(value for value in ins if value in entering),
        continued=continued,
        bases=replay.finish(),
        hoisted=tuple(node for node in inside if node in hoisted),
        hidden_out=hidden_out,
        reference=reference,
        block=block,
    )


def _plan_to_output(
    name: str, segment: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], first: int
) -> RegionPlan:
    where, blocks = _chain_of(segment, first, 0)
    start = blocks[first - 1].end if first else 0
    _refuse_side_effects(where, nodes, start, len(nodes))
    inside = nodes[start:]
    outs = live_outs(inside)
    _refuse_odd_results(where, outs)
    ins = live_ins(inside)
    hidden_out, reference = _compared(where, segment, nodes, first)
    return RegionPlan(
        name=name,
        loops=tuple(loop.name for loop, _ in segment),
        blocks=blocks,
        first=first,
        last=0,
        start=start,
        end=len(nodes),
        live_ins=ins,
        live_outs=outs,
        streams=tuple(value for value in ins if tensor_of(value) is not None and not is_weight(value)),
        continued=(False,) * len(outs),
        bases=BaseTracer({}, {}, start).finish(),
        hoisted=(),
        hidden_out=hidden_out,
        reference=reference,
    )


def _chain_of(segment: Sequence[tuple[BlockLoop, int]], first: int, last: int) -> tuple[str, tuple[Block, ...]]:
    """Name and blocks of a segment of the chain; refused where F and B leave nothing of it."""
    blocks = tuple(block for loop, _ in segment for block in loop.blocks)
    where = " + ".join(loop.name for loop, _ in segment)
    if first + last >= len(blocks):
        raise RegionRefused(
            f"{where}: Fn_compute_blocks + Bn_compute_blocks = {first} + {last} leaves nothing to bypass of "
            f"{len(blocks)} blocks; choose a sum below {len(blocks)}"
        )
    return where, blocks


def _handed_on(segment: Sequence[tuple[BlockLoop, int]]) -> dict[fx.Node, fx.Node]:
    """What a carried value that a block puts out continues: the value that the block took in its place."""
    found = {
        out: into
        for loop, _ in segment
        for carried in loop.carried
        for into, out in zip(carried.inputs, carried.outputs, strict=True)
        if out is not None
    }
    for (before, from_slot), (after, to_slot) in itertools.pairwise(segment):
        out, into = before.carried[from_slot].outputs[-1], after.carried[to_slot].inputs[0]
        if out is not None and same_kind(out, into):
            found.setdefault(into, out)  # a layer between two loops is bypassed as a block is
    return found


def _compared(
    where: str, segment: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], first: int
) -> tuple[fx.Node | None, Continuation | None]:
    """H_F and its base; None for F = 0, and a base of None where H_F continues nothing."""
    hidden_out = _hidden_behind(segment, first)
    if first and hidden_out is None:
        raise RegionRefused(f"{where}: block {first - 1} hands no hidden states on")
    if hidden_out is None:
        return None, None
    head = BaseTracer(_handed_on(segment), positions_of(nodes), segment[0][0].blocks[0].start)
    return hidden_out, head.finish() if head.add(hidden_out) else None


def _refuse_odd_results(where: str, outs: Sequence[fx.Node]) -> None:
    odd = next((value for value in outs if tensor_of(value) is None), None)
    if odd is not None:
        raise RegionRefused(f"{where}: {odd.name}, which leaves the region, is no tensor and cannot be stored")


def _refuse_side_effects(where: str, nodes: Sequence[fx.Node], start: int, end: int) -> None:
    inside = set(nodes[start:end])
    for node in nodes[start:end]:
        target = mutated_input(node)
        if target is not None and root_of(target) not in inside:
            raise RegionRefused(
                f"{where}: {node.name} writes in place to {root_of(target).name}, made outside the region"
            )
    for low, high in open_contexts(nodes):
        if low < start <= high or low < end <= high:
            raise RegionRefused(
                f"{where}: {nodes[low].name} opens a context (autocast, grad mode) that spans its border"
            )


def _hoisted(inside: Sequence[fx.Node], moving: set[fx.Node]) -> set[fx.Node]:
    """Nodes that no carried value reaches but that something behind the region needs, with what they need."""
    within = set(inside)
    wanted = [node for node in live_outs(inside) if node not in moving]
    found: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node in found:
            continue
        found.add(node)
        wanted.extend(item for item in node.all_input_nodes if item in within)
    return found


def _hidden_behind(segment: Sequence[tuple[BlockLoop, int]], first: int) -> fx.Node | None:
    """H_F: the hidden states that block F-1 hands on; None for F = 0."""
    index = first - 1
    if index < 0:
        return None
    for loop, slot in segment:
        if index < loop.num_blocks:
            return loop.carried[slot].outputs[index]
        index -= loop.num_blocks
    return None


def _hidden_ahead(segment: Sequence[tuple[BlockLoop, int]], index: int) -> fx.Node:
    """The hidden states that enter block `index`."""
    return [value for loop, slot in segment for value in loop.carried[slot].inputs][index]
