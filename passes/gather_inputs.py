"""Gives a graph with a cache branch its inputs as one sequence, and takes each input from it just before its first use.

    def forward(self, region_call, hidden, w_0, ..., w_999):     def forward(self, region_call, inputs):
        ...                                                          w_0 = inputs[1]
        blocks_0 = self.blocks_0(hidden, w_0)               ->       blocks_0 = self.blocks_0(hidden, w_0)
        region_call.run(..., (blocks_0, w_1, ..., w_999))            region_call.run(..., (inputs, blocks_0))

A step that bypasses the region then never touches the region's weights. Passing a thousand weights on costs more than
deciding. Each weight is a Python object that the processor has to fetch.

Hoisted values (`hoist_invariants`) come in a sequence of their own, which computes a value when it is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from .base import Facts, Interface, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .graph_values import meta_of_value
from .hoist_invariants import HOISTED
from .infer_dependence import Dependence
from .insert_cache_branch import CacheBranch
from .plan_regions import RegionReport


@dataclass(frozen=True)
class GatheredInputs(Interface):
    """Fact: the graph takes its inputs in one sequence.

    Attributes:
        count: the number of inputs.
    """

    count: int


class GatherInputs(Rewrite):
    """Joins the inputs after `region_call` into one sequence, in the outer graph and in the regions' graphs."""

    name: ClassVar[str] = "gather_inputs"
    requires: ClassVar[tuple[type, ...]] = (CacheBranch,)
    provides: ClassVar[tuple[type, ...]] = (GatheredInputs,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        region_call, *inputs = gm.graph.find_nodes(op="placeholder")
        plain = {node: place for place, node in enumerate(node for node in inputs if HOISTED not in node.meta)}
        hoisted = {node: node.meta[HOISTED] for node in inputs if HOISTED in node.meta}
        for name, places in (("inputs", plain), ("hoisted", hoisted)):
            if places:
                sequence = _new_input(gm.graph, name, inputs[0])
                for call in gm.graph.find_nodes(op="call_method", target="run"):
                    _join_region_inputs(gm, call, sequence, places)
                _read_late(gm.graph, sequence, places)
                inputs = [node for node in inputs if node not in places]
        return Rewritten(gm, len(plain) + len(hoisted), (GatheredInputs(len(plain)),))


def _new_input(graph: fx.Graph, name: str, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        return graph.placeholder(name, type_expr=Any)


def _join_region_inputs(gm: fx.GraphModule, call: fx.Node, sequence: fx.Node, places: Mapping[fx.Node, int]) -> None:
    """Let the region's graph take inputs of the outer graph out of their sequence, its new first input."""
    region_call, entry, compute, values, *bypassed = cast("tuple[Any, ...]", call.args)
    graph = cast(fx.GraphModule, gm.get_submodule(compute.target)).graph
    inner = dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))
    first = _new_input(graph, sequence.name, next(iter(graph.nodes)))
    _read_late(graph, first, {node: places[value] for node, value in inner.items() if value in places})
    rest = tuple(value for value in values if value not in places)
    call.args = (region_call, entry, compute, (sequence, *rest), *bypassed)


def _read_late(graph: fx.Graph, sequence: fx.Node, places: Mapping[fx.Node, int]) -> None:
    """Replace inputs of `graph` by the values that `sequence` holds at their places, read just before the first use."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node, place in places.items():
        name, users = node.name, sorted(node.users, key=order.__getitem__)
        if users:
            with graph.inserting_before(users[0]):
                getitem = graph.call_function(operator.getitem, (sequence, place))
            getitem.meta = meta_of_value(node)
            node.replace_all_uses_with(getitem)
        graph.erase_node(node)
        if users:
            getitem.name = name
