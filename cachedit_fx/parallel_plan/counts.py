"""Reads the description of a model's blocks off its graph, before it is rewritten.

linear(hidden [1, 4096, 3072], weight)      on cut tokens: its FLOPs are divided, its weights read by every rank
linear(temb [1, 3072], weight)              whole on every rank, and kept between steps: not counted
attention(q, k, v), all cut                 self-attention: heads, head size, segments
attention(q, k, v), only q cut              counts as linear layers do
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import fx

from cachedit_fx.parallel_plan.descriptions import Blocks
from cachedit_fx.passes.block_loops import BlockLoop, Detection
from cachedit_fx.passes.graph_cost import bytes_of, cost_of, hint, inner_size, is_compute
from cachedit_fx.passes.graph_values import is_of_module, tensor_of
from cachedit_fx.passes.infer_sequence_axes import SequenceAxes
from cachedit_fx.passes.layouts import Cut
from cachedit_fx.passes.replace_attention import Call, attention_calls


def blocks_of(gm: fx.GraphModule, detection: Detection, axes: SequenceAxes) -> tuple[Blocks, ...]:
    """The blocks of the chain's loops that attend over cut tokens, one entry for each loop; empty if there are none.

    Args:
        detection, axes: facts of this graph, for any number of ranks above 1.
    """
    calls = {call.node: call for call in attention_calls(gm)}
    found = (_blocks_of(loop, calls, axes) for loop in detection.chain_loops)
    return tuple(blocks for blocks in found if blocks is not None)


def _blocks_of(loop: BlockLoop, calls: Mapping[fx.Node, Call], axes: SequenceAxes) -> Blocks | None:
    nodes = loop.blocks[0].nodes
    own = [(calls[node], cut) for node in nodes if node in calls and (cut := _exchanged(node, axes)) is not None]
    if not own:
        return None
    (call, cut), inside = own[0], set(nodes)
    query = tensor_of(call.arguments["query"])
    assert query is not None
    divided = [node for node in nodes if node is not call.node and is_compute(node) and _is_divided(node, axes)]
    before = _reached(call.node, inside, lambda node: node.all_input_nodes)
    after = _reached(call.node, inside, lambda node: node.users)
    weights = {weight for node in divided for weight in node.all_input_nodes if _is_matrix(weight)}
    return Blocks(
        name=loop.name,
        count=len(loop.blocks),
        segments=tuple(hint(segment.length) for segment in cut.segments),
        heads=hint(query.shape[-3]),
        head_size=hint(query.shape[-1]),
        width=next(size for node in divided if node in before and (size := inner_size(node)) is not None),
        token_flops=sum(map(cost_of, divided)),
        beside_flops=sum(cost_of(node) for node in divided if node not in before | after),
        weight_bytes=sum(map(bytes_of, weights)),
    )


def _exchanged(node: fx.Node, axes: SequenceAxes) -> Cut | None:
    """How the tokens of self-attention are cut; None if its queries, keys and values do not all change hands."""
    step = axes.steps.get(node)
    return step.handed_on if step is not None else None


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
