"""From a candidate to a loop: shares out the gaps between blocks, and classifies each value that crosses a border.

carried     taken from the block before, handed on in the same place
invariant   enters several blocks
per block   enters one block
skip        made by a block, taken by one further on than the next
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet

from torch import fx

from .block_loops import Block, BlockLoop, Carried
from .graph_aliases import dependents
from .graph_cost import cost_of, is_compute
from .graph_values import (
    closes_context,
    describe_shape,
    describe_value,
    input_nodes,
    live_ins,
    live_outs,
    same_kind,
    tensor_of,
    value_of,
)
from .loops_by_name import Span

MIN_BLOCK_NODES = 4


def build_loop(span: Span, nodes: Sequence[fx.Node], prints: Sequence[Hashable], evidence: str) -> BlockLoop | None:
    """Share out the gaps, classify the values; None where the blocks are no loop."""
    ranges = _share_gaps(span.ranges, nodes, prints)
    blocks = tuple(_block(name, start, end, nodes) for name, (start, end) in zip(span.block_names, ranges, strict=True))
    if not all(_is_substantial(block) for block in blocks):
        return None
    carried = _carried(blocks, prints)
    if not carried or not all(_is_driven(block, carried, index) for index, block in enumerate(blocks)):
        return None
    inside = nodes[blocks[0].start : blocks[-1].end]
    made_by = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    uses: Counter[fx.Node] = Counter(value for block in blocks for value in block.live_ins)
    streams = {value for item in carried for value in (*item.inputs, *item.outputs) if value is not None}
    outside = [value for value in uses if value not in made_by and value not in streams]
    skips = tuple(
        (value, made_by[value], index)
        for index, block in enumerate(blocks)
        for value in block.live_ins
        if value in made_by and made_by[value] < index - 1
    )
    return BlockLoop(
        name=span.name,
        blocks=blocks,
        carried=carried,
        invariant=tuple(value for value in outside if uses[value] > 1),
        per_block=tuple(value for value in outside if uses[value] == 1),
        skips=skips,
        cost=sum(cost_of(node) for node in inside),
        evidence=evidence,
    )


def _block(name: str, start: int, end: int, nodes: Sequence[fx.Node]) -> Block:
    inside = tuple(nodes[start:end])
    return Block(name, start, end, inside, live_ins(inside), live_outs(inside))


def _is_substantial(block: Block) -> bool:
    return block.num_nodes >= MIN_BLOCK_NODES and any(is_compute(node) for node in block.nodes)


def _is_driven(block: Block, carried: Sequence[Carried], index: int) -> bool:
    """Whether the block's work depends on what it is handed. Parallel experts add to a sum that they do not read."""
    return any(is_compute(node) for node in dependents({item.inputs[index] for item in carried}, block.nodes))


def _share_gaps(
    ranges: Sequence[tuple[int, int]], nodes: Sequence[fx.Node], prints: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Give the nodes between two blocks to one of them: what uses the block before (a ControlNet residual added,
    its autocast left) to it, what prepares the next (a modulation picked) to that. Ahead of the first and behind
    the last block, as much is taken as looks like what stands between the others."""
    starts = [start for start, _ in ranges]
    ends = [end for _, end in ranges]
    for index in range(len(ranges) - 1):
        gap = range(ends[index], starts[index + 1])
        if not gap:
            continue
        made = nodes[starts[index] : starts[index + 1]]
        of_block = set(made[: ends[index] - starts[index]])
        behind = dependents(of_block, made) | {node for node in made if closes_context(node)}
        cut = max((at + 1 for at in gap if nodes[at] in behind), default=gap.start)
        ends[index] = starts[index + 1] = cut
    lead = starts[1] - ranges[1][0]
    if lead < 0 and starts[0] + lead >= 0:
        here = prints[starts[0] + lead : starts[0]]
        if list(here) == list(prints[starts[1] : ranges[1][0]]):
            starts[0] += lead
    trail = ends[-2] - ranges[-2][1]
    if trail > 0 and list(prints[ends[-1] : ends[-1] + trail]) == list(prints[ranges[-2][1] : ends[-2]]):
        ends[-1] += trail
    return list(zip(starts, ends, strict=True))


def _carried(blocks: Sequence[Block], prints: Sequence[Hashable]) -> tuple[Carried, ...]:
    """The slots of values that are handed from block to block with one shape and dtype."""
    borders = [_handed_over(before, after) for before, after in itertools.pairwise(blocks)]
    slots = min(borders, key=len)
    if not slots:
        return ()
    kinds = [describe_value(value_of(value)) for value in slots]
    columns = [_match_kinds(border, kinds) for border in borders]
    result: list[Carried] = []
    for slot in range(len(slots)):
        values = [column[slot] for column in columns]
        if any(value is None for value in values):
            continue
        inner = [value for value in values if value is not None]
        first = _entering_first(blocks, inner[0], prints, {item.inputs[0] for item in result})
        last = _leaving_last(blocks, inner[-1], prints, {item.outputs[-1] for item in result})
        tensor = tensor_of(inner[0])
        if first is None or tensor is None or not tensor.dtype.is_floating_point:
            continue
        result.append(
            Carried(first.name, tuple(tensor.shape), tensor.dtype, inputs=(first, *inner), outputs=(*inner, last))
        )
    return tuple(result)


def _handed_over(before: Block, after: Block) -> list[fx.Node]:
    made = set(before.nodes)
    return [value for value in after.live_ins if value in made and tensor_of(value) is not None]


def _match_kinds(border: Sequence[fx.Node], kinds: Sequence[Hashable]) -> list[fx.Node | None]:
    """For every kind, in order, the next unused value of that kind."""
    left = list(border)
    result: list[fx.Node | None] = []
    for kind in kinds:
        match = next((value for value in left if describe_value(value_of(value)) == kind), None)
        if match is not None:
            left.remove(match)
        result.append(match)
    return result


def _entering_first(
    blocks: Sequence[Block], second: fx.Node, prints: Sequence[Hashable], taken: AbstractSet[fx.Node]
) -> fx.Node | None:
    """The value that enters block 0 where `second` enters block 1: at the same argument if the two blocks are alike
    node for node. Otherwise a live-in of its shape that is not `taken`: rather one that does not enter block 1 too (a
    time embedding for each token has the shape of the hidden states), one of its dtype, one that the block's work
    depends on, one that is used alike."""
    zero, one = blocks[0], blocks[1]
    if _identical(zero, one, prints):
        for mine, twin in zip(zero.nodes, one.nodes, strict=True):
            for value, other in zip(input_nodes(mine), input_nodes(twin), strict=True):
                if other is second:
                    return value
    alike = [v for v in zero.live_ins if v.op != "get_attr" and v not in taken and _same_shape(v, second)]
    wanted = _uses(second, one)

    def unlikeness(value: fx.Node) -> tuple[bool, bool, bool, int]:
        drives = any(is_compute(node) for node in dependents({value}, zero.nodes))
        return value in one.live_ins, not same_kind(value, second), not drives, -(wanted & _uses(value, zero)).total()

    return min(alike, key=unlikeness, default=None)


def _uses(value: fx.Node, block: Block) -> Counter[Hashable]:
    """How `block` uses `value`: what is called, and at which of its arguments."""
    users = value.users.keys() & set(block.nodes)
    return Counter((user.target, at) for user in users for at, item in enumerate(input_nodes(user)) if item is value)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Autocast may hand the first block another dtype than the blocks hand on."""
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None or not first.dtype.is_floating_point:
        return False
    return describe_shape(first.shape) == describe_shape(second.shape)


def _leaving_last(
    blocks: Sequence[Block], previous: fx.Node, prints: Sequence[Hashable], taken: AbstractSet[fx.Node | None]
) -> fx.Node | None:
    """The value that leaves the last block where `previous` leaves the one before it; None if nothing there is used."""
    last, before = blocks[-1], blocks[-2]
    if _identical(last, before, prints):
        twin = last.nodes[before.nodes.index(previous)]
        return twin if twin in last.live_outs else None
    entering = dependents({previous}, last.nodes)
    alike = [v for v in last.live_outs if v in entering and v not in taken and same_kind(v, previous)]
    before_alike = [v for v in before.live_outs if same_kind(v, previous)]
    place = before_alike.index(previous)
    return alike[place] if len(alike) == len(before_alike) else next(reversed(alike), None)


def _identical(a: Block, b: Block, prints: Sequence[Hashable]) -> bool:
    return list(prints[a.start : a.end]) == list(prints[b.start : b.end])
