"""Lets collectives run beside the computation: splits each into a start and a wait, and moves them apart.

    q = exchange(self.to_q(x))                  q_started = start_exchange(self.to_q(x))
    k = exchange(self.to_k(x))                  k_started = start_exchange(self.to_k(x))
    v = exchange(self.to_v(x))           ->     v_started = start_exchange(self.to_v(x))
    h = self.mlp(x)                             y = attention(wait(q_started), wait(k_started), wait(v_started))
    y = exchange(attention(q, k, v))            y_started = start_exchange(y)
    out = self.proj(cat(y, h))                  h = self.mlp(x)
                                                out = self.proj(cat(wait(y_started), h))

The nodes of each block are put in a new order. Next comes what the earliest collective lacks that has not started; in
the end, what no collective lacks. Among these, waits come last, and the others keep their order. Collectives start in
the order of the graph, so that all ranks agree.

Some nodes keep their order to each other: those that name memory that one of them writes to, and those that draw random
numbers. Nothing moves past a node without a result, such as a switch of autocast. No bit of a result changes.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from cachedit_fx.collectives import HALVES

from .base import Facts, FlatGraph, Interface, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .graph_aliases import Memory, memory_of, written_by
from .graph_values import closes_context, is_data_movement, meta_of_value
from .infer_dependence import is_random
from .insert_ulysses import ContextParallel, fake_result
from .normalize import Normalized

STARTS = frozenset(start for start, _ in HALVES.values())
WAITS = frozenset(wait for _, wait in HALVES.values())


@dataclass(frozen=True)
class OverlappedCollectives(Interface):
    """Fact: so many collectives run beside the computation."""

    count: int

    @property
    def note(self) -> str:
        """A sentence for people."""
        return f"ulysses: {self.count} collectives run beside the computation of their block"


class OverlapCollectives(Rewrite):
    """Splits the collectives of blocks, and moves what is independent between start and wait."""

    name: ClassVar[str] = "overlap_collectives"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection, ContextParallel)
    provides: ClassVar[tuple[type, ...]] = (OverlappedCollectives,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, TimestepSource)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        if facts[Normalized].impurities:
            return Rewritten(gm, 0)
        blocks = [block.nodes for loop in facts[Detection].loops for block in loop.blocks]
        count = 0
        for nodes in blocks:
            if any(node.target in HALVES for node in nodes):
                count += sum(node.target in HALVES for node in nodes)
                _reorder([half for node in nodes for half in _halves(node)])
        return Rewritten(gm, count, (OverlappedCollectives(count),) if count else ())


def _halves(node: fx.Node) -> tuple[fx.Node, ...]:
    """The start and the wait that take the place of a collective; any other node as it is."""
    if node.target not in HALVES:
        return (node,)
    start, wait = HALVES[node.target]
    with node.graph.inserting_before(node):
        started = node.graph.call_function(start, node.args)
    started.meta = meta_of_value(node)
    started.meta["example_value"] = fake_result(started)
    node.target, node.args = wait, (started, *node.args)
    return started, node


def _reorder(nodes: Sequence[fx.Node]) -> None:
    """Give consecutive nodes their new order. Nodes in between that do not compute go before them."""
    units = _units(nodes)
    unit_of = {node: index for index, unit in enumerate(units) for node in unit}
    needs = [
        {unit_of[source] for node in unit for source in node.all_input_nodes if source in unit_of} - {index}
        for index, unit in enumerate(units)
    ]
    for before, after in _kept_orders(units):
        needs[after].add(before)
    anchor = nodes[-1].next
    for index in _order(units, needs):
        for node in units[index]:
            anchor.prepend(node)


def _units(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Nodes that stay together: one that gives a tuple, and those that take it apart."""
    units: list[list[fx.Node]] = []
    for node in nodes:
        if units and node.target is operator.getitem and node.args[0] is units[-1][0]:
            units[-1].append(node)
        else:
            units.append([node])
    return units


def _kept_orders(units: Sequence[Sequence[fx.Node]]) -> Iterable[tuple[int, int]]:
    """Pairs of units, the first of which must run before the second, whatever they read."""
    written = {memory for unit in units for node in unit for target in written_by(node) for memory in memory_of(target)}
    last: dict[Memory | str, int] = {}
    barrier: int | None = None
    for index, unit in enumerate(units):
        chains: set[Memory | str] = {memory for node in unit for memory in _named_by(node)} & written
        chains |= {"collectives"} if any(node.target in STARTS for node in unit) else set()
        chains |= {"random"} if any(is_random(_module_of(node), node) for node in unit) else set()
        if _is_barrier(unit):
            yield from ((before, index) for before in range(barrier or 0, index))
            barrier = index
        elif barrier is not None:
            yield barrier, index
        yield from ((last[chain], index) for chain in chains if chain in last)
        last |= dict.fromkeys(chains, index)


def _named_by(node: fx.Node) -> set[Memory]:
    """The memory of the node's value, and of what it takes."""
    return {memory for each in (node, *node.all_input_nodes) for memory in memory_of(each)}


def _module_of(node: fx.Node) -> fx.GraphModule:
    module = node.graph.owning_module
    assert module is not None
    return module


def _is_barrier(unit: Sequence[fx.Node]) -> bool:
    """Whether the unit runs for an effect that nothing here knows: its result has no use, or it switches a context."""
    first = unit[0]
    is_unused = not first.users and not is_data_movement(first) and not written_by(first)
    return is_unused or closes_context(first) or any(map(closes_context, first.users))


def _order(units: Sequence[Sequence[fx.Node]], needs: Sequence[set[int]]) -> list[int]:
    """The units in an order in which they can run: for the earliest collective first, waits last.

    Args:
        needs: for each unit, those that must run before it.
    """
    starts = [index for index, unit in enumerate(units) if unit[0].target in STARTS]
    serves = [len(starts)] * len(units)
    """For each unit, the number of the first start that needs it."""
    for number, start in enumerate(starts):
        pending = [start]
        while pending:
            index = pending.pop()
            if serves[index] > number:
                serves[index] = number
                pending += needs[index]
    users: list[list[int]] = [[] for _ in units]
    for index, each in enumerate(needs):
        for before in each:
            users[before].append(index)
    missing = [len(each) for each in needs]

    def rank(index: int) -> tuple[int, bool, int]:
        return serves[index], units[index][0].target in WAITS, index

    ready = [rank(index) for index, number in enumerate(missing) if not number]
    heapq.heapify(ready)
    order = []
    while ready:
        *_, index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, rank(user))
    return order
