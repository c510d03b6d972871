"""Gives a graph with a cache branch its inputs as one sequence, and takes each from it just before its first use.

    def forward(self, region_call, hidden, w_0, ..., w_999):     def forward(self, region_call, inputs):
        ...                                                          w_0 = inputs[1]
        blocks_0 = self.blocks_0(hidden, w_0)               ->       blocks_0 = self.blocks_0(hidden, w_0)
        region_call.run(..., (blocks_0, w_1, ..., w_999))            region_call.run(..., (inputs, blocks_0))

A step that bypasses the region then never touches the region's weights. Passing a thousand of them on costs more than
deciding, and each is a Python object that the processor has to fetch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from .base import Facts, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .insert_cache_branch import CacheBranch
from .plan_regions import RegionReport


@dataclass(frozen=True)
class GatheredInputs:
    """Fact: the graph takes its inputs in one sequence.

    Attributes:
        count: how many there are.
    """

    count: int


class GatherInputs(Rewrite):
    """Joins the graph's inputs after `region_call` into one, and those of them that a region is computed from."""

    name: ClassVar[str] = "gather_inputs"
    requires: ClassVar[tuple[type, ...]] = (CacheBranch,)
    provides: ClassVar[tuple[type, ...]] = (GatheredInputs,)
    preserves: ClassVar[tuple[type, ...]] = (CacheBranch, TimestepSource, Detection, RegionReport)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        region_call, *inputs = gm.graph.find_nodes(op="placeholder")
        places = {node: place for place, node in enumerate(inputs)}
        gathered = _new_input(gm.graph, region_call.next)
        for call in gm.graph.find_nodes(op="call_method", target="run"):
            _gather_into_region(gm, call, gathered, places)
        _take_late(gm.graph, gathered, places)
        return Rewritten(gm, len(inputs), (GatheredInputs(len(inputs)),))


def _new_input(graph: fx.Graph, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        return graph.placeholder("inputs", type_expr=Any)


def _gather_into_region(gm: fx.GraphModule, call: fx.Node, gathered: fx.Node, places: Mapping[fx.Node, int]) -> None:
    """Let the region's graph take the outer graph's inputs out of their sequence, which it is given first of all."""
    region_call, entry, compute, values, *bypassed = cast("tuple[Any, ...]", call.args)
    graph = cast(fx.GraphModule, gm.get_submodule(compute.target)).graph
    inner = dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))
    first = _new_input(graph, next(iter(graph.nodes)))
    _take_late(graph, first, {node: places[value] for node, value in inner.items() if value in places})
    rest = tuple(value for value in values if value not in places)
    call.args = (region_call, entry, compute, (gathered, *rest), *bypassed)


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
