"""Plans the regions: the body nodes that may be bypassed, and how each value that leaves a region continues an input.

    block 0 .. F-1 │ block F ............ N-B-1   │ block N-B .. N-1
         head      │ region: computed or bypassed │      tail

A live-out of the region has a *base*: the value that it would have if every block handed its carried values on
unchanged. Block outputs are traced back to the matching block inputs, and glue between loops (streams concatenated,
sliced) is replayed. A layer between two loops counts as a block if it keeps the hidden states' shape. The stored
residual is live-out minus base.

A live-out that continues nothing is stored whole. If it depends on no carried value at all, it is hoisted out of the
region instead, and always computed.

The same tracing over the head gives the reference of the difference: r = H_F - base(H_F). For a plain chain this is
H_F - H_in.

With `to_output` the region holds all nodes after the head, to the end of the graph, and every live-out is stored whole.
With F = 0 it is the whole graph.

With the unit "block" every block of the middle is a separate region, and its input is compared:

    block 0 .. F-1 │ block F │ block F+1 │ ............ │ block N-B-1 │ block N-B .. N-1
         head      │ region  │ region    │ glue, region │ region      │      tail
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from cachedit_fx.config.cache import Cut
from cachedit_fx.config.options import Scope
from cachedit_fx.config.rules import OptionError

from .base import Analysis, Facts, FlatGraph
from .block_loops import Block, BlockLoop, Detection
from .graph_aliases import dependents, write_spans, written_by
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
from .infer_dependence import Dependence, Level
from .normalize import Normalized
from .side_effects import SideEffects, hoisted_nodes
from .trace_bases import BaseTracer, Continuation


@dataclass(frozen=True)
class RegionPlan:
    """One region of one graph.

    Attributes:
        name: `region_<k>`.
        loops: names of the loops that the region runs through.
        blocks: all blocks of its chain, head and tail included.
        first, last: F and B, the numbers of blocks that always run before and after the region.
        start, end: its body nodes are [start, end) in graph order.
        live_ins, live_outs: the values that cross its border; hoisted values are left out.
        streams: the live-ins that are carried. Stored values fit only streams of the same shapes.
        continued: for each live-out, whether it has a base. A live-out without a base is stored whole.
        bases: the bases of the continued live-outs, from values outside the region.
        hoisted: nodes inside [start, end) that always run, before the region.
        hidden_out: H_F, the hidden states after the head; None if F is 0. For a region of one block, the hidden states
            that enter the block, for any F.
        reference: base of H_F. None if H_F continues nothing (then H_F itself is compared), and for a region of one
            block.
        loop: the index of its loop in the chain, if every loop has a separate region.
        block: the index of its block in `blocks`, if every block is a separate region.
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
        """Size of the results in bytes, in their own dtypes, symbols replaced by their hints.

        Values that are stored one precision up, as by default, take twice as much.
        """
        tensors = [tensor for value in self.live_outs if (tensor := tensor_of(value)) is not None]
        return sum(numel(tensor) * tensor.element_size() for tensor in tensors)

    @property
    def middle(self) -> tuple[Block, ...]:
        """The blocks that a reuse bypasses."""
        if self.block is not None:
            return (self.blocks[self.block],)
        return self.blocks[self.first : self.num_blocks - self.last]


@dataclass(frozen=True)
class RegionReport:
    """Fact: the regions, and a sentence for each region that cannot be."""

    regions: tuple[RegionPlan, ...]
    refusals: tuple[str, ...]


class PlanRegions(Analysis[RegionReport]):
    """Plans the regions of the chain.

    Args:
        cuts: the cut of the chain; then, with scope "loop", the cuts of its loops in order, if they have separate ones.
            With the unit "block" every block of the middle is a region, except the cut's exclusions. Blocks
            are numbered over the chain, or in each loop with scope "loop".
        scope: "model" makes one region over the whole chain, "loop" one for each of its loops.
        to_output: whether the region runs to the end of the graph.
        kept: indices of the graph's results that outlive the call in attributes and containers.

    Raises:
        OptionError: in `run`, if there are more cuts of loops than loops.
    """

    name: ClassVar[str] = "plan_regions"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)
    uses: ClassVar[tuple[type, ...]] = (Normalized, Dependence)
    provides: ClassVar[type] = RegionReport

    def __init__(
        self,
        cuts: Sequence[Cut],
        scope: Scope = "model",
        to_output: bool = False,
        kept: AbstractSet[int] = frozenset(),
    ) -> None:
        self.cut, *self.loop_cuts = cuts or [Cut(0, 0)]
        self.scope, self.to_output, self.kept = scope, to_output, kept

    def run(self, gm: fx.GraphModule, facts: Facts) -> RegionReport:
        detection = facts[Detection]
        whole = list(zip(detection.chain_loops, detection.hidden, strict=True))
        if whole and len(self.loop_cuts) > len(whole):
            raise OptionError(
                f"params_modifiers has {len(self.loop_cuts)} entries, and the chain {len(whole)} block loops: "
                f"{', '.join(loop.name for loop, _ in whole)}"
            )
        impurities = facts[Normalized].impurities if Normalized in facts else ()
        if impurities:
            return RegionReport((), impurities)
        nodes = body_nodes(gm.graph)
        effects = SideEffects(gm.graph, self.kept)
        dependence = facts.get(Dependence)
        regions: list[RegionPlan] = []
        refusals: list[str] = []
        for index, chain in enumerate([whole] if self.scope == "model" else [[entry] for entry in whole]):
            cut = self.loop_cuts[index] if index < len(self.loop_cuts) else self.cut
            for block in _units(chain, cut):
                try:
                    region = self._region(f"region_{len(regions)}", chain, nodes, cut, block)
                    of_sample = _results_of_sample(region, whole, nodes, dependence) if effects else ()
                    loss = next(effects.lost(region, of_sample), None)
                    if loss is not None:
                        raise RegionRefused(f"{' + '.join(region.loops)}: {loss}")
                    regions.append(replace(region, loop=index if self.scope == "loop" else None))
                except RegionRefused as refusal:
                    refusals.append(str(refusal))
        if whole and not regions and not refusals:
            refusals.append("non_prune_block_ids names every block that is left; leave out those that may be pruned")
        return RegionReport(tuple(regions), tuple(dict.fromkeys(refusals)))

    def _region(
        self, name: str, chain: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], cut: Cut, block: int | None
    ) -> RegionPlan:
        first, last = cut.first, cut.last
        if self.to_output:
            return _plan_to_output(name, chain, nodes, first)
        region = _plan(name, chain, nodes, first, last, block)
        if block is None and not any(region.continued) and len(chain) > 1:
            # Residuals of the largest loop are worth more than whole values of the chain.
            return _plan(name, [max(chain, key=lambda entry: entry[0].cost)], nodes, first, last)
        return region


def _units(chain: Sequence[tuple[BlockLoop, int]], cut: Cut) -> Iterable[int | None]:
    """The indices of the blocks that become regions; None is one region of the whole middle."""
    if not chain:
        return []
    total = sum(loop.num_blocks for loop, _ in chain)
    if cut.unit == "region" or cut.first + cut.last >= total:
        return [None]  # an empty middle is refused as a whole
    return [block for block in range(cut.first, total - cut.last) if block not in cut.exclusions]


class RegionRefused(Exception):
    """A region that the cut asks for cannot be; the message says why."""


def _plan(
    name: str,
    chain: Sequence[tuple[BlockLoop, int]],
    nodes: Sequence[fx.Node],
    first: int,
    last: int,
    block: int | None = None,
) -> RegionPlan:
    loops = [loop for loop, _ in chain]
    title, blocks = _title_and_blocks(chain, first, last)
    start = blocks[first - 1].end if first else blocks[0].start
    end = blocks[len(blocks) - last - 1].end
    if block is not None:
        start, end = blocks[block].start, blocks[block].end
    _refuse_open_spans(title, nodes, start, end)

    block_inputs = _block_inputs(chain)
    position = positions_of(nodes)
    carried_values = [v for loop in loops for carried in loop.carried for v in carried.inputs + carried.outputs]
    sources = {v for v in carried_values if v is not None and position.get(v, -1) < start}
    inside = nodes[start:end]
    carriers = dependents(sources, inside)
    hoisted = hoisted_nodes(inside, carriers)
    body = [node for node in inside if node not in hoisted]
    ins, outs = live_ins(body), live_outs(body)

    _refuse_odd_results(title, outs)
    tracer = BaseTracer(block_inputs, position, start, hoisted)
    continued = tuple(tracer.add(value) for value in outs)
    if block is not None and not any(continued):
        raise RegionRefused(f"{title}: block {block} hands on nothing that enters it: a residual has no base")
    if block is None:
        hidden_out, reference = _comparison(title, chain, nodes, first)
    else:
        hidden_out, reference = _hidden_before(chain, block), None
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
        streams=tuple(value for value in ins if value in sources),
        continued=continued,
        bases=tracer.finish(),
        hoisted=tuple(node for node in inside if node in hoisted),
        hidden_out=hidden_out,
        reference=reference,
        block=block,
    )


def _plan_to_output(
    name: str, chain: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], first: int
) -> RegionPlan:
    title, blocks = _title_and_blocks(chain, first, 0)
    start, end = blocks[first - 1].end if first else 0, len(nodes)
    while {target.op for target in written_by(nodes[end - 1])} == {"placeholder"}:  # writes to graph inputs come last
        end -= 1
    _refuse_open_spans(title, nodes, start, end)
    inside = nodes[start:end]
    outs = live_outs(inside)
    _refuse_odd_results(title, outs)
    ins = live_ins(inside)
    hidden_out, reference = _comparison(title, chain, nodes, first)
    return RegionPlan(
        name=name,
        loops=tuple(loop.name for loop, _ in chain),
        blocks=blocks,
        first=first,
        last=0,
        start=start,
        end=end,
        live_ins=ins,
        live_outs=outs,
        streams=tuple(value for value in ins if tensor_of(value) is not None and not is_weight(value)),
        continued=(False,) * len(outs),
        bases=BaseTracer({}, {}, start).finish(),
        hoisted=(),
        hidden_out=hidden_out,
        reference=reference,
    )


def _title_and_blocks(chain: Sequence[tuple[BlockLoop, int]], first: int, last: int) -> tuple[str, tuple[Block, ...]]:
    """Name and blocks of a chain. Raises if F and B leave no block to bypass."""
    blocks = tuple(block for loop, _ in chain for block in loop.blocks)
    title = " + ".join(loop.name for loop, _ in chain)
    if first + last >= len(blocks):
        raise RegionRefused(
            f"{title}: Fn_compute_blocks + Bn_compute_blocks = {first} + {last} leaves nothing to bypass of "
            f"{len(blocks)} blocks; choose a sum below {len(blocks)}"
        )
    return title, blocks


def _block_inputs(chain: Sequence[tuple[BlockLoop, int]]) -> dict[fx.Node, fx.Node]:
    """Carried value that leaves a block -> the value that entered the block in the same place."""
    inputs = {
        out: into
        for loop, _ in chain
        for carried in loop.carried
        for into, out in zip(carried.inputs, carried.outputs, strict=True)
        if out is not None
    }
    for (before, from_slot), (after, to_slot) in itertools.pairwise(chain):
        out, into = before.carried[from_slot].outputs[-1], after.carried[to_slot].inputs[0]
        if out is not None and same_kind(out, into):
            inputs.setdefault(into, out)  # a layer between two loops is bypassed as a block is
    return inputs


def _comparison(
    title: str, chain: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], first: int
) -> tuple[fx.Node | None, Continuation | None]:
    """(H_F, its base). Both are None if F is 0; the base is None if H_F continues nothing."""
    hidden_out = _hidden_after(chain, first)
    if first and hidden_out is None:
        raise RegionRefused(f"{title}: block {first - 1} hands no hidden states on")
    if hidden_out is None:
        return None, None
    head = BaseTracer(_block_inputs(chain), positions_of(nodes), chain[0][0].blocks[0].start)
    return hidden_out, head.finish() if head.add(hidden_out) else None


def _results_of_sample(
    region: RegionPlan, chain: Sequence[tuple[BlockLoop, int]], nodes: Sequence[fx.Node], dependence: Dependence | None
) -> set[fx.Node]:
    """The region's results that continue the sample. Others continue a text, or a state that the caller keeps."""
    start, positions, inputs = chain[0][0].blocks[0].start, positions_of(nodes), _block_inputs(chain)
    results = set()
    for result in region.live_outs:
        tracer = BaseTracer(inputs, positions, start)
        if dependence is not None and tracer.add(result):
            roots = tracer.finish().inputs
            results |= {result for root in roots if dependence.level(root) is Level.SAMPLE}
    return results


def _refuse_odd_results(title: str, outs: Sequence[fx.Node]) -> None:
    """Raise if a result is not a tensor."""
    odd = next((value for value in outs if tensor_of(value) is None), None)
    if odd is not None:
        raise RegionRefused(f"{title}: {odd.name}, which leaves the region, is no tensor and cannot be stored")


def _refuse_open_spans(title: str, nodes: Sequence[fx.Node], start: int, end: int) -> None:
    """Raise if a context, or several names of memory that is written to, span the region's border."""
    for low, high in open_contexts(nodes):
        if low < start <= high or low < end <= high:
            raise RegionRefused(
                f"{title}: {nodes[low].name} opens a context (autocast, grad mode) that spans its border"
            )
    for low, high in write_spans(nodes):
        if low < start <= high or low < end <= high:
            raise RegionRefused(f"{title}: {nodes[high].name} writes in place to memory that crosses its border")


def _hidden_after(chain: Sequence[tuple[BlockLoop, int]], first: int) -> fx.Node | None:
    """H_F: the hidden states that block F-1 hands on; None if F is 0."""
    index = first - 1
    if index < 0:
        return None
    for loop, slot in chain:
        if index < loop.num_blocks:
            return loop.carried[slot].outputs[index]
        index -= loop.num_blocks
    return None


def _hidden_before(chain: Sequence[tuple[BlockLoop, int]], index: int) -> fx.Node:
    """The hidden states that enter block `index`."""
    return [value for loop, slot in chain for value in loop.carried[slot].inputs][index]
