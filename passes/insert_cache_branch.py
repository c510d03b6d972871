"""Puts a guarded branch around each region of an outlined graph.

    blocks_0 = self.blocks_0(h, ...)                blocks_0 = self.blocks_0(h, ...)
    blocks_1 = self.blocks_1(blocks_0, ...)   ->    entry_0 = region_call.decide(0, h, blocks_0, (blocks_0, ...))
    blocks_2 = self.blocks_2(blocks_1, ...)         region_0 = region_call.run(entry_0,
    ...                                                 self.region_0_compute, (blocks_0, ..., weights),
                                                        self.region_0_bases, (blocks_0, ...))
                                                    ...

The graph gets a new first input, `region_call`: the run time's side of one call. Its two methods decide, store and
predict. So the policy is not in the graph, and changing the policy compiles nothing. `region_k_compute` is the region's
original code. `region_k_bases` gives for each result the base that a stored residual is added to, or None for a result
that is stored whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from torch.fx.node import map_arg

from .base import Facts, Interface, Rewrite, Rewritten, make_module, module_of
from .block_loops import Detection
from .find_timestep import TimestepSource
from .graph_values import live_ins, meta_of_value
from .infer_dependence import Dependence
from .outline_blocks import PLACE, Outline
from .plan_regions import RegionPlan, RegionReport
from .trace_bases import Continuation


@dataclass(frozen=True)
class CacheBranch(Interface):
    """Fact: the graph's first input is the run time's side of a call, which decides about its regions.

    Attributes:
        regions: as planned, indexed by the numbers that the graph passes to `decide`.
    """

    regions: tuple[RegionPlan, ...] = field(repr=False)


class InsertCacheBranch(Rewrite):
    """Turns each region into `region_call.run(...)`, guarded by `region_call.decide(...)`."""

    name: ClassVar[str] = "insert_cache_branch"
    requires: ClassVar[tuple[type, ...]] = (RegionReport, Outline)
    provides: ClassVar[tuple[type, ...]] = (CacheBranch,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        regions = facts[RegionReport].regions
        if not regions:
            return Rewritten(gm, 0)
        region_call = _add_input(gm.graph)
        origin = dict(facts[Outline].origin)
        for number, region in enumerate(regions):
            _guard(gm, number, region, region_call, origin)
        gm.delete_all_unused_submodules()
        return Rewritten(gm, len(regions), (CacheBranch(regions),))


def _add_input(graph: fx.Graph) -> fx.Node:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        return graph.placeholder("region_call", type_expr=Any)


def _guard(
    gm: fx.GraphModule, number: int, region: RegionPlan, region_call: fx.Node, origin: dict[fx.Node, fx.Node]
) -> None:
    members = [node for node in gm.graph.nodes if region.start <= node.meta.get(PLACE, -1) < region.end]
    results = [origin[value] for value in region.live_outs if value in origin]
    inputs = live_ins(members)
    base_inputs = list(dict.fromkeys(origin[value] for value in region.bases.inputs))
    compute, bases = f"{region.name}_compute", f"{region.name}_bases"
    gm.add_module(compute, module_of(gm, compute, inputs, members, results))
    gm.add_module(bases, _bases(gm, bases, base_inputs, region, origin))

    inside, successor = set(members), members[-1].next
    with gm.graph.inserting_before(members[0]):
        hidden, reference = _comparison(gm, region, origin)
        values = dict.fromkeys((*region.bases.inputs, *region.streams))
        streams = tuple(origin[value] for value in values if value in origin)  # others are hoisted, and never read
        entry = gm.graph.call_method("decide", (region_call, number, reference, hidden, streams))
        entry.name = f"entry_{number}"
    with gm.graph.inserting_before(successor):
        compute_args = gm.graph.get_attr(compute), tuple(inputs)
        bypass_args = gm.graph.get_attr(bases), tuple(base_inputs)
        call = gm.graph.call_method("run", (region_call, entry, *compute_args, *bypass_args))
        call.name = region.name
        call.meta = {"example_value": tuple(node.meta.get("example_value") for node in results)}
        for index, value in enumerate(value for value in region.live_outs if value in origin):
            getitem = gm.graph.call_function(operator.getitem, (call, index))
            getitem.meta = meta_of_value(results[index])
            results[index].replace_all_uses_with(getitem, delete_user_cb=lambda user: user not in inside)
            origin[value] = getitem
    for node in reversed(members):
        gm.graph.erase_node(node)


def _bases(
    gm: fx.GraphModule, name: str, inputs: Sequence[fx.Node], region: RegionPlan, origin: Mapping[fx.Node, fx.Node]
) -> fx.GraphModule:
    """A graph module that gives the base of each result from `inputs`; None for a result without a base."""
    graph = fx.Graph()
    local = {node: graph.placeholder(node.name) for node in inputs}
    for node, placeholder in local.items():
        placeholder.meta = meta_of_value(node)
    results = iter(_inline(graph, region.bases, {value: local[origin[value]] for value in region.bases.inputs}))
    bases = [
        next(results) if has_base else None
        for value, has_base in zip(region.live_outs, region.continued, strict=True)
        if value in origin
    ]
    graph.output(tuple(bases))
    return make_module(gm, graph, name)


def _comparison(
    gm: fx.GraphModule, region: RegionPlan, origin: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node | None, fx.Node | None]:
    """(H_F, its base) as nodes of the outer graph; None for one that the region does not have."""
    if region.hidden_out is None:
        return None, None
    hidden = origin[region.hidden_out]
    if region.reference is None:
        return hidden, None
    (reference,) = _inline(gm.graph, region.reference, {value: origin[value] for value in region.reference.inputs})
    return hidden, reference


def _inline(graph: fx.Graph, bases: Continuation, values: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Copy a continuation's graph into `graph`, with `values` as its inputs, and return its results."""
    local: dict[fx.Node, fx.Node] = {}
    results: list[fx.Node] = []
    inputs = iter(bases.inputs)
    for node in bases.graph.nodes:
        if node.op == "placeholder":
            local[node] = values[next(inputs)]
        elif node.op == "output":
            map_arg(node.args[0], lambda result: results.append(local[result]))
        else:
            local[node] = graph.node_copy(node, local.__getitem__)
            local[node].meta = dict(node.meta)
    return results
