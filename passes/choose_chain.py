"""Chooses the chain: the loops that the hidden states run through and that hold the bulk of the work."""

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

# A loop whose work is less than this share of the largest loop's is a refiner, and belongs to the prologue.
MIN_CHAIN_SHARE = 0.125


# Of a module that is several graphs: a chain with less than this share of the weights of the largest container, which
# lies in another graph, is a refiner.
MIN_GRAPH_SHARE = 0.4


def choose_chain(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    loops: Sequence[BlockLoop],
    chosen: Sequence[str] | None,
    traced: Traced,
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    notes: list[str] = []
    named = next((node for node in gm.graph.nodes if _is_sample(node, traced.sample)), None)
    sample = named or _sample_input(gm)
    made = dependents({sample}, nodes) | {sample} if sample is not None else set()
    streamed = [any(item.inputs[0] in made for item in loop.carried) for loop in loops]
    if not loops:
        return (), (), ["no block loop: no run of alike sub-graphs in which each takes what the one before it made"]
    inside = sum(map(numel_of, filter(is_weight, gm.graph.nodes)))
    elsewhere = traced.parameters - inside
    if chosen is not None:
        by_name = {loop.name: index for index, loop in enumerate(loops)}
        unknown = [name for name in chosen if name not in by_name]
        if unknown and elsewhere > inside:
            return (), (), [f"no chain: {unknown[0]} is not in this part of the model"]
        if unknown:
            raise LoopNotFound(f"no block loop is called {unknown[0]!r}; this graph has {sorted(by_name)}")
        chain = sorted(by_name[name] for name in chosen)
        notes.append(f"chain chosen by option: {', '.join(loops[i].name for i in chain)}")
    elif named is not None and not any(streamed):
        return (), (), [f"no chain: {traced.sample} runs through none of {', '.join(loop.name for loop in loops)}"]
    else:
        chain = _connected_bulk(nodes, loops, streamed, notes)
        own = sum(numel_of(value) for index in chain for value in loops[index].weights)
        if own < MIN_GRAPH_SHARE * min(elsewhere, traced.largest):
            names = " + ".join(loops[index].name for index in chain)
            return (
                (),
                (),
                [*notes, f"no chain: the weights of {names} are few beside those of blocks outside this graph"],
            )
    hidden: list[int] = []
    for index in chain:
        hidden.append(_hidden_slot(nodes, loops[index], sample, loops[chain[0]] if hidden else None, hidden))
    return tuple(chain), tuple(hidden), notes


def _connected_bulk(
    nodes: Sequence[fx.Node], loops: Sequence[BlockLoop], streamed: Sequence[bool], notes: list[str]
) -> list[int]:
    """The largest loop that carries the hidden states (of all, where that cannot be told), and those before and after
    it that feed it or are fed by it, that carry them if it does, and that are not small beside it."""
    main = max(range(len(loops)), key=lambda index: (streamed[index], loops[index].cost))
    chain = [main]
    for index, loop in enumerate(loops):
        if index == main:
            continue
        share = _share(loop, loops[main])
        first, second = sorted((index, main))
        source = {v for item in loops[first].carried for v in item.outputs[-1:] if v is not None}
        reached = dependents(source, nodes[loops[first].start :])
        feeds = any(item.inputs[0] in source or item.inputs[0] in reached for item in loops[second].carried)
        if not feeds:
            why = "what it hands on does not become a carried value of the chain"
        elif share < MIN_CHAIN_SHARE:
            why = f"its work is {share:.1%} of {loops[main].name}'s"
        elif streamed[main] and not streamed[index]:
            why = "the hidden states do not run through it"
        else:
            chain.append(index)
            continue
        notes.append(f"{loop.name} is left out of the chain: {why}")
    return sorted(chain)


def _share(loop: BlockLoop, main: BlockLoop) -> float:
    """The work of `loop` over that of `main`; their weights instead where a length that depends on data leaves the work
    unknown."""
    sizes = [size for item in (*loop.carried, *main.carried) for size in item.shape]
    if any(isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) for size in sizes):
        return sum(map(numel_of, loop.weights)) / max(sum(map(numel_of, main.weights)), 1)
    return loop.cost / max(main.cost, 1)


def _is_sample(node: fx.Node, name: str | None) -> bool:
    tensor = tensor_of(node) if node.op == "placeholder" and name is not None else None
    return tensor is not None and tensor.dtype.is_floating_point and source_name(node) == name


def _sample_input(gm: fx.GraphModule) -> fx.Node | None:
    """The graph input that holds the noisy sample: the one that looks most like the output."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = [tensor for item in input_nodes(output) if (tensor := tensor_of(item)) is not None]
    if not results:
        return None
    like = max(results, key=numel)
    inputs = [
        node
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and (tensor := tensor_of(node)) is not None
        and tensor.dtype.is_floating_point
        and tensor.dim() == like.dim()
        and tensor.dim() >= 3
        and not isinstance(value_of(node), torch.nn.Parameter)
    ]

    def likeness(node: fx.Node) -> tuple[int, int]:
        tensor = tensor_of(node)
        assert tensor is not None
        same = sum(a == b for a, b in zip(describe_shape(tensor.shape), describe_shape(like.shape), strict=True))
        return (same, numel(tensor))

    return max(inputs, key=likeness, default=None)


def _hidden_slot(
    nodes: Sequence[fx.Node],
    loop: BlockLoop,
    sample: fx.Node | None,
    before: BlockLoop | None,
    hidden: Sequence[int],
) -> int:
    """Which carried value is the hidden-states stream: the one made from the sample (in a later loop of the chain,
    from the hidden states that the first loop hands on by data movement); of several, the largest."""
    candidates = list(range(len(loop.carried)))
    if before is not None:
        source = before.carried[hidden[0]].outputs[-1]
        moved = _moved_from(source, nodes) if source is not None else set()
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in moved] or candidates
    elif sample is not None:
        made = dependents({sample}, nodes[: loop.start]) | {sample}
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in made] or candidates

    def size(slot: int) -> int:
        tensor = tensor_of(loop.carried[slot].inputs[0])
        return numel(tensor) if tensor is not None else 0

    return max(candidates, key=size)


def _moved_from(source: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """`source` and whatever is made of it by data movement alone."""
    reached = {source}
    positions = positions_of(nodes)
    for node in nodes[positions[source] + 1 :]:
        if is_data_movement(node) and any(item in reached for item in node.all_input_nodes):
            reached.add(node)
    return reached
