"""Turns a candidate into a loop: shares out the gaps between blocks, and classifies each value that crosses a border.

span   [0, 38) . . [40, 78) . . [80, 118)     ->     blocks   [0, 40)[40, 80)[80, 120)

carried     a block takes it from the previous block and hands it on in the same place
invariant   enters several blocks
per block   enters one block
skip        a block makes it, and a block after the next takes it
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
    """Share out the gaps and classify the values. None if the candidate is no loop.

    A candidate is a loop under three conditions. Every block is substantial. Some value is carried from block to block.
    The work of every block depends on the carried values.
    """
    ranges = _share_gaps(span.ranges, nodes, prints)
    blocks = tuple(_block(name, start, end, nodes) for name, (start, end) in zip(span.block_names, ranges, strict=True))
    if not all(_is_substantial(block) for block in blocks):
        return None
    carried = _carried(blocks, prints)
    if not carried or not all(_is_driven(block, carried, index) for index, block in enumerate(blocks)):
        return None
    body = nodes[blocks[0].start : blocks[-1].end]
    makers = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    uses: Counter[fx.Node] = Counter(value for block in blocks for value in block.live_ins)
    streams = {value for slot in carried for value in (*slot.inputs, *slot.outputs) if value is not None}
    outsiders = [value for value in uses if value not in makers and value not in streams]
    skips = tuple(
        (value, makers[value], index)
        for index, block in enumerate(blocks)
        for value in block.live_ins
        if value in makers and makers[value] < index - 1
    )
    return BlockLoop(
        name=span.name,
        blocks=blocks,
        carried=carried,
        invariant=tuple(value for value in outsiders if uses[value] > 1),
        per_block=tuple(value for value in outsiders if uses[value] == 1),
        skips=skips,
        cost=sum(cost_of(node) for node in body),
        evidence=evidence,
    )


def _block(name: str, start: int, end: int, nodes: Sequence[fx.Node]) -> Block:
    body = tuple(nodes[start:end])
    return Block(name, start, end, body, live_ins(body), live_outs(body))


def _is_substantial(block: Block) -> bool:
    return block.num_nodes >= MIN_BLOCK_NODES and any(is_compute(node) for node in block.nodes)


def _is_driven(block: Block, carried: Sequence[Carried], index: int) -> bool:
    """Whether the block's work depends on its carried values. Parallel experts add to a sum that they do not read."""
    return any(is_compute(node) for node in dependents({slot.inputs[index] for slot in carried}, block.nodes))


def _share_gaps(
    ranges: Sequence[tuple[int, int]], nodes: Sequence[fx.Node], prints: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Give each node between two blocks to one of them.

    A node that uses the earlier block (adds a ControlNet residual, leaves its autocast) belongs to that block. A node
    that prepares the later block (picks a modulation) belongs to the later one. The first block takes as many nodes
    before it, and the last block as many after it, as match the nodes between the other blocks.
    """
    starts = [start for start, _ in ranges]
    ends = [end for _, end in ranges]
    for index in range(len(ranges) - 1):
        gap = range(ends[index], starts[index + 1])
        if not gap:
            continue
        window = nodes[starts[index] : starts[index + 1]]
        block = set(window[: ends[index] - starts[index]])
        users = dependents(block, window) | {node for node in window if closes_context(node)}
        cut = max((at + 1 for at in gap if nodes[at] in users), default=gap.start)
        ends[index] = starts[index + 1] = cut
    lead = starts[1] - ranges[1][0]
    if lead < 0 and starts[0] + lead >= 0:
        prefix = prints[starts[0] + lead : starts[0]]
        if list(prefix) == list(prints[starts[1] : ranges[1][0]]):
            starts[0] += lead
    trail = ends[-2] - ranges[-2][1]
    if trail > 0 and list(prints[ends[-1] : ends[-1] + trail]) == list(prints[ranges[-2][1] : ends[-2]]):
        ends[-1] += trail
    return list(zip(starts, ends, strict=True))


def _carried(blocks: Sequence[Block], prints: Sequence[Hashable]) -> tuple[Carried, ...]:
    """The values that are handed from block to block with one shape and dtype, a slot for each."""
    borders = [_transfers(before, after) for before, after in itertools.pairwise(blocks)]
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
        first = _entering_first(blocks, inner[0], prints, {other.inputs[0] for other in result})
        last = _leaving_last(blocks, inner[-1], prints, {other.outputs[-1] for other in result})
        tensor = tensor_of(inner[0])
        if first is None or tensor is None or not tensor.dtype.is_floating_point:
            continue
        result.append(
            Carried(first.name, tuple(tensor.shape), tensor.dtype, inputs=(first, *inner), outputs=(*inner, last))
        )
    return tuple(result)


def _transfers(before: Block, after: Block) -> list[fx.Node]:
    """The tensors that `after` takes from `before`."""
    body = set(before.nodes)
    return [value for value in after.live_ins if value in body and tensor_of(value) is not None]


def _match_kinds(border: Sequence[fx.Node], kinds: Sequence[Hashable]) -> list[fx.Node | None]:
    """For every kind, in order, the next unused value of that kind."""
    rest = list(border)
    result: list[fx.Node | None] = []
    for kind in kinds:
        match = next((value for value in rest if describe_value(value_of(value)) == kind), None)
        if match is not None:
            rest.remove(match)
        result.append(match)
    return result


def _entering_first(
    blocks: Sequence[Block], second: fx.Node, prints: Sequence[Hashable], others: AbstractSet[fx.Node]
) -> fx.Node | None:
    """The value that enters block 0 as `second` enters block 1.

    If the two blocks are identical node for node, it is the value at the same argument. Otherwise it is a live-in of
    the same shape that enters no other slot (`others`). Candidates are preferred in this order:

    1. not entering block 1 too: a time embedding for each token has the shape of the hidden states;
    2. of the same dtype;
    3. driving the block's work;
    4. used at the same arguments.
    """
    zero, one = blocks[0], blocks[1]
    if _identical(zero, one, prints):
        for node, counterpart in zip(zero.nodes, one.nodes, strict=True):
            for value, other in zip(input_nodes(node), input_nodes(counterpart), strict=True):
                if other is second:
                    return value
    candidates = [v for v in zero.live_ins if v.op != "get_attr" and v not in others and _same_shape(v, second)]
    usage = _uses(second, one)

    def unlikeness(value: fx.Node) -> tuple[bool, bool, bool, int]:
        drives = any(is_compute(node) for node in dependents({value}, zero.nodes))
        return value in one.live_ins, not same_kind(value, second), not drives, -(usage & _uses(value, zero)).total()

    return min(candidates, key=unlikeness, default=None)


def _uses(value: fx.Node, block: Block) -> Counter[Hashable]:
    """How `block` uses `value`: each call's target, and the index of the argument."""
    users = value.users.keys() & set(block.nodes)
    return Counter(
        (user.target, at) for user in users for at, source in enumerate(input_nodes(user)) if source is value
    )


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are tensors of one shape, `a` of floating point.

    Dtypes may differ: autocast may hand the first block another dtype than the blocks hand on.
    """
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None or not first.dtype.is_floating_point:
        return False
    return describe_shape(first.shape) == describe_shape(second.shape)


def _leaving_last(
    blocks: Sequence[Block], previous: fx.Node, prints: Sequence[Hashable], others: AbstractSet[fx.Node | None]
) -> fx.Node | None:
    """The value that leaves the last block as `previous` leaves the block before it. None if no node uses the value.

    `others` are the values that leave the last block in other slots.
    """
    last, before = blocks[-1], blocks[-2]
    if _identical(last, before, prints):
        counterpart = last.nodes[before.nodes.index(previous)]
        return counterpart if counterpart in last.live_outs else None
    users = dependents({previous}, last.nodes)
    candidates = [v for v in last.live_outs if v in users and v not in others and same_kind(v, previous)]
    previous_candidates = [v for v in before.live_outs if same_kind(v, previous)]
    place = previous_candidates.index(previous)
    return candidates[place] if len(candidates) == len(previous_candidates) else next(reversed(candidates), None)


def _identical(a: Block, b: Block, prints: Sequence[Hashable]) -> bool:
    return list(prints[a.start : a.end]) == list(prints[b.start : b.end])
