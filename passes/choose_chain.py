"""Chooses the chain: the loops that the hidden states run through and that do most of the work.

refiner (2 blocks) ──► double_blocks (19) ──► single_blocks (38)     ->     chain = (double_blocks, single_blocks)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from .base import Traced
from .block_loops import BlockLoop, LoopNotFound
from .find_timestep import source_name
from .graph_aliases import dependents
from .graph_cost import numel, numel_of
from .graph_values import (
    describe_shape,
    input_nodes,
    is_data_movement,
    is_weight,
    positions_of,
    tensor_of,
    value_of,
)

MIN_CHAIN_SHARE = 0.125
"""A loop that does less than this share of the largest loop's work is a refiner, and belongs to the prologue."""
MIN_GRAPH_SHARE = 0.4
"""For a module that becomes several graphs: the largest container may lie in another graph. A chain with less than this
share of that container's weights is a refiner."""


def choose_chain(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    loops: Sequence[BlockLoop],
    names: Sequence[str] | None,
    traced: Traced,
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """The chain of a graph.

    Args:
        nodes: body nodes of `gm`.
        loops: every loop of the graph, in graph order.
        names: the loops that make up the chain; None chooses them.
        traced: knowledge from outside the graph.

    Returns:
        Indices of the chain's loops, for each of these the index of its hidden-states stream, and notes for people.

    Raises:
        LoopNotFound: if `names` has a name that no loop of the model can have.
    """
    notes: list[str] = []
    argument = next((node for node in gm.graph.nodes if _is_sample(node, traced.sample)), None)
    sample = argument or sample_input(gm)
    stream = dependents({sample}, nodes) | {sample} if sample is not None else set()
    carries_sample = [any(value.inputs[0] in stream for value in loop.carried) for loop in loops]
    if not loops:
        return (), (), ["no block loop: no run of alike sub-graphs in which each takes what the one before it made"]
    weights_here = sum(map(numel_of, filter(is_weight, gm.graph.nodes)))
    weights_elsewhere = traced.parameters - weights_here
    if names is not None:
        by_name = {loop.name: index for index, loop in enumerate(loops)}
        unknown = [name for name in names if name not in by_name]
        if unknown and weights_elsewhere > weights_here:
            return (), (), [f"no chain: {unknown[0]} is not in this part of the model"]
        if unknown:
            raise LoopNotFound(f"no block loop is called {unknown[0]!r}; this graph has {sorted(by_name)}")
        chain = sorted(by_name[name] for name in names)
        notes.append(f"chain chosen by option: {', '.join(loops[i].name for i in chain)}")
    elif argument is not None and not any(carries_sample):
        return (), (), [f"no chain: {traced.sample} runs through none of {', '.join(loop.name for loop in loops)}"]
    else:
        chain = _connected_bulk(nodes, loops, carries_sample, notes)
        chain_weights = sum(numel_of(value) for index in chain for value in loops[index].weights)
        if chain_weights < MIN_GRAPH_SHARE * min(weights_elsewhere, traced.largest):
            title = " + ".join(loops[index].name for index in chain)
            return (
                (),
                (),
                [*notes, f"no chain: the weights of {title} are few beside those of blocks outside this graph"],
            )
    hidden: list[int] = []
    for index in chain:
        hidden.append(_hidden_slot(nodes, loops[index], sample, loops[chain[0]] if hidden else None, hidden))
    return tuple(chain), tuple(hidden), notes


def _connected_bulk(
    nodes: Sequence[fx.Node], loops: Sequence[BlockLoop], carries_sample: Sequence[bool], notes: list[str]
) -> list[int]:
    """The main loop, and the loops that belong to the chain with it.

    The main loop is the largest of the loops that carry the hidden states; if none is known to, the largest of all.
    Another loop belongs to the chain under three conditions. It feeds the main loop or is fed by it. It does at least
    `MIN_CHAIN_SHARE` of the main loop's work. It carries the hidden states if the main loop does.
    """
    main = max(range(len(loops)), key=lambda index: (carries_sample[index], loops[index].cost))
    chain = [main]
    for index, loop in enumerate(loops):
        if index == main:
            continue
        share = _share(loop, loops[main])
        first, second = sorted((index, main))
        sources = {v for value in loops[first].carried for v in value.outputs[-1:] if v is not None}
        users = dependents(sources, nodes[loops[first].start :])
        feeds = any(value.inputs[0] in sources or value.inputs[0] in users for value in loops[second].carried)
        if not feeds:
            reason = "what it hands on does not become a carried value of the chain"
        elif share < MIN_CHAIN_SHARE:
            reason = f"its work is {share:.1%} of {loops[main].name}'s"
        elif carries_sample[main] and not carries_sample[index]:
            reason = "the hidden states do not run through it"
        else:
            chain.append(index)
            continue
        notes.append(f"{loop.name} is left out of the chain: {reason}")
    return sorted(chain)


def _share(loop: BlockLoop, main: BlockLoop) -> float:
    """The work of `loop` over the work of `main`.

    If a length depends on data, the work is unknown, and the share is that of the weights.
    """
    sizes = [size for value in (*loop.carried, *main.carried) for size in value.shape]
    if any(isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) for size in sizes):
        return sum(map(numel_of, loop.weights)) / max(sum(map(numel_of, main.weights)), 1)
    return loop.cost / max(main.cost, 1)


def _is_sample(node: fx.Node, name: str | None) -> bool:
    tensor = tensor_of(node) if node.op == "placeholder" and name is not None else None
    return tensor is not None and tensor.dtype.is_floating_point and source_name(node) == name


def sample_input(gm: fx.GraphModule) -> fx.Node | None:
    """The graph input that holds the noisy sample: the one that looks most like the output."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = [tensor for value in input_nodes(output) if (tensor := tensor_of(value)) is not None]
    if not results:
        return None
    largest = max(results, key=numel)
    inputs = [
        node
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and (tensor := tensor_of(node)) is not None
        and tensor.dtype.is_floating_point
        and tensor.dim() == largest.dim()
        and tensor.dim() >= 3
        and not isinstance(value_of(node), torch.nn.Parameter)
    ]

    def likeness(node: fx.Node) -> tuple[int, int]:
        tensor = tensor_of(node)
        assert tensor is not None
        matches = sum(a == b for a, b in zip(describe_shape(tensor.shape), describe_shape(largest.shape), strict=True))
        return (matches, numel(tensor))

    return max(inputs, key=likeness, default=None)


def _hidden_slot(
    nodes: Sequence[fx.Node],
    loop: BlockLoop,
    sample: fx.Node | None,
    first: BlockLoop | None,
    hidden: Sequence[int],
) -> int:
    """The index of the carried value that is the hidden-states stream.

    In the first loop of the chain the stream depends on the sample. In a later loop it is moved data of the hidden
    states that the first loop hands on. If several values qualify, the largest is the stream.
    """
    candidates = list(range(len(loop.carried)))
    if first is not None:
        source = first.carried[hidden[0]].outputs[-1]
        copies = _copies_of(source, nodes) if source is not None else set()
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in copies] or candidates
    elif sample is not None:
        stream = dependents({sample}, nodes[: loop.start]) | {sample}
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in stream] or candidates

    def size(slot: int) -> int:
        tensor = tensor_of(loop.carried[slot].inputs[0])
        return numel(tensor) if tensor is not None else 0

    return max(candidates, key=size)


def _copies_of(source: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """`source`, and every value made of it by data movement alone."""
    copies = {source}
    positions = positions_of(nodes)
    for node in nodes[positions[source] + 1 :]:
        if is_data_movement(node) and any(value in copies for value in node.all_input_nodes):
            copies.add(node)
    return copies
