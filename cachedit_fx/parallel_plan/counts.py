"""Reads the description of a model's blocks off its graph, before it is rewritten.

linear(hidden [1, 4096, 3072], weight)      on cut tokens: its FLOPs are divided, its weights read by every rank
linear(temb [1, 3072], weight)              whole on every rank, and kept between steps: not counted
attention(q, k, v), all cut                 self-attention: heads, head size, segments
attention(q, k, v), only q cut              counts as linear layers do
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from cachedit_fx.parallel_plan.descriptions import Blocks
from cachedit_fx.passes.block_loops import BlockLoop, Detection
from cachedit_fx.passes.graph_cost import UNKNOWN_SIZE, bytes_of, cost_of, hint, inner_size, is_compute
from cachedit_fx.passes.graph_values import is_of_module, tensor_of
from cachedit_fx.passes.infer_sequence_axes import SequenceAxes
from cachedit_fx.passes.layouts import Cut, Segment
from cachedit_fx.passes.replace_attention import Call, attention_calls
from cachedit_fx.ring import ring_attention


def blocks_of(gm: fx.GraphModule, detection: Detection, axes: SequenceAxes) -> tuple[Blocks, ...]:
    """The blocks of the chain's loops, on one sample: an entry for each self-attention over cut tokens.

    The first of a block has the block's other work too. It is empty if these ranks cannot share self-attention.

    Args:
        detection, axes: facts of this graph, for some ranks that exchange heads, or are a ring.
    """
    calls = {call.node: call for call in attention_calls(gm)}
    return tuple(blocks for loop in detection.chain_loops for blocks in _blocks_of(loop, calls, axes))


def _blocks_of(loop: BlockLoop, calls: Mapping[fx.Node, Call], axes: SequenceAxes) -> Iterator[Blocks]:
    nodes = loop.blocks[0].nodes
    own = {node: cut for node in nodes if node in calls and (cut := _exchanged(node, axes)) is not None}
    inside = set(nodes)
    divided = [node for node in nodes if node not in own and is_compute(node) and _is_divided(node, axes)]
    weights = {weight for node in divided for weight in node.all_input_nodes if _is_matrix(weight)}
    tied = set[fx.Node]()
    for node in own:
        tied |= _reached(node, inside, lambda each: each.all_input_nodes)
        tied |= _reached(node, inside, lambda each: each.users)
    for place, (node, cut) in enumerate(own.items()):
        query = tensor_of(calls[node].arguments["query"])
        assert query is not None
        *leading, heads, _, head_size = map(hint, query.shape)
        before = _reached(node, inside, lambda each: each.all_input_nodes)
        widths = (size for each in divided if each in before and (size := inner_size(each)) is not None)
        blocks = Blocks(
            name=loop.name,
            count=len(loop.blocks),
            segments=tuple(_length(segment, query) for segment in cut.segments),
            heads=heads,
            head_size=head_size,
            width=next(widths, heads * head_size),
            token_flops=0,
        )
        if not place:
            samples = math.prod(leading)
            blocks = replace(
                blocks,
                token_flops=sum(map(cost_of, divided)) // samples,
                beside_flops=sum(cost_of(each) for each in divided if each not in tied) // samples,
                weight_bytes=sum(map(bytes_of, weights)),
            )
        yield blocks


def _length(segment: Segment, tensor: torch.Tensor) -> int:
    """Tokens of a segment, of the size that the graph was captured at; symbols are those of the tensor's graph."""
    size = segment.length
    if isinstance(size, int):
        return size
    assert isinstance(tensor, FakeTensor) and tensor.fake_mode.shape_env is not None
    return tensor.fake_mode.shape_env.optimization_hint(size, fallback=UNKNOWN_SIZE)


def _exchanged(node: fx.Node, axes: SequenceAxes) -> Cut | None:
    """How the tokens of self-attention are cut; None if its queries, keys and values are not all shared."""
    step = axes.steps.get(node)
    if step is None or step.target is not ring_attention:
        return step.handed_on if step is not None else None
    cut = step.result
    return cut if isinstance(cut, Cut) else None


def _is_divided(node: fx.Node, axes: SequenceAxes) -> bool:
    step = axes.steps.get(node)
    return step is not None and (step.made is not None or step.is_partial)


def _is_matrix(node: fx.Node) -> bool:
    """Whether the node is a weight of two dimensions or more, and no bias."""
    tensor = tensor_of(node)
    return is_of_module(node) and tensor is not None and tensor.dim() > 1


def _reached(start: fx.Node, inside: set[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes of a block that lead to a node, or that it leads to."""
    pending, reached = [start], set[fx.Node]()
    while pending:
        for node in neighbours(pending.pop()):
            if node in inside and node not in reached:
                reached.add(node)
                pending.append(node)
    return reached
