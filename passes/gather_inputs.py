"""Gives a graph with a cache branch its inputs as one sequence, each taken from it where it is first used.

    def forward(self, cache, hidden, w_0, ..., w_999):           def forward(self, cache, inputs):
        ...                                                          w_0 = inputs[1]
        blocks_0 = self.blocks_0(hidden, w_0)               ->       blocks_0 = self.blocks_0(hidden, w_0)
        cache.run(0, ..., (blocks_0, w_1, ..., w_999))               cache.run(0, ..., (inputs, blocks_0))

A step that bypasses the region then never touches the region's weights: passing a thousand of them on costs more than
deciding, and each is a Python object that the processor has to fetch.

Requires `cache_input`; provides `gathered_inputs`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import fx

from .base import Pass, PassResult, facts


class GatherInputs(Pass):
    """The graph's inputs behind `cache` become one, and so do those of them that a region is computed from."""

    name: ClassVar[str] = "gather_inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"cache_input"})
    provides: ClassVar[frozenset[str]] = frozenset({"gathered_inputs"})

    def run(self, gm: fx.GraphModule) -> PassResult:
        cache, *inputs = gm.graph.find_nodes(op="placeholder")
        places = {node: place for place, node in enumerate(inputs)}
        gathered = _new_input(gm.graph, cache.next)
        for call in gm.graph.find_nodes(op="call_method", target="run"):
            _gather_into_region(gm, call, gathered, places)
        _take_late(gm.graph, gathered, places)
        facts(gm)["gathered_inputs"] = True
        return PassResult(gm, len(inputs))


def _new_input(graph: fx.Graph, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        return graph.placeholder("inputs", type_expr=Any)


def _gather_into_region(gm: fx.GraphModule, call: fx.Node, gathered: fx.Node, places: Mapping[fx.Node, int]) -> None:
    """Let the region's graph take the outer graph's inputs out of their sequence, which it is given first of all."""
    cache, number, decision, compute, given, *bypassed = cast("tuple[Any, ...]", call.args)
    graph = cast(fx.GraphModule, gm.get_submodule(compute.target)).graph
    inner = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    first = _new_input(graph, next(iter(graph.nodes)))
    _take_late(graph, first, {node: places[value] for node, value in inner.items() if value in places})
    rest = tuple(value for value in given if value not in places)
    call.args = (cache, number, decision, compute, (gathered, *rest), *bypassed)


def _take_late(graph: fx.Graph, gathered: fx.Node, places: Mapping[fx.Node, int]) -> None:
    """Replace inputs of `graph` by what `gathered` holds at their places, taken just before the first use."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node, place in places.items():
        name, users = node.name, sorted(node.users, key=order.__getitem__)
        if users:
            with graph.inserting_before(users[0]):
                taken = graph.call_function(operator.getitem, (gathered, place))
            taken.meta = dict(node.meta)
            node.replace_all_uses_with(taken)
        graph.erase_node(node)
        if users:
            taken.name = name
