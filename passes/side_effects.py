"""Tells what a bypassed region would lose beside its results: writes, and the identity of memory.

    k_cache[:, 3:5] = k      in block 4; k depends on the hidden states. A bypass would keep the keys of another step.
    self.calls += 1          in block 4, on nothing carried: hoisted out of the region, so that it always runs.

Normalized writes to graph inputs stand at the graph's end. The written values are results of the region then. A result
may be written to an input, or kept, only if it continues the sample and the rest of the model uses it as well, as
hidden states are that blocks change in place: the caller finds in them the values that the model went on with. Other
results continue a state that outlives the call (a sum, a maximum). A predicted state would be wrong for good.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from .find_timestep import source_name
from .graph_aliases import Memory, memory_of, names_by_memory, written_by
from .graph_values import body_nodes, live_outs, positions_of

if TYPE_CHECKING:
    from .plan_regions import RegionPlan


@dataclass(frozen=True)
class Write:
    """One in-place write of a flat graph: the node, its target, and the memory of the target."""

    node: fx.Node
    target: fx.Node
    memory: frozenset[Memory]


def hoisted_nodes(inside: Sequence[fx.Node], carriers: AbstractSet[fx.Node]) -> set[fx.Node]:
    """Live-outs of a region that depend on no carried value (are no `carriers`), and the nodes that they need.

    Writes to their memory are needed too.
    """
    within = set(inside)
    writes = _writes(node for node in inside if node not in carriers)
    pending = [node for node in live_outs(inside) if node not in carriers]
    nodes: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        pending.extend(source for source in node.all_input_nodes if source in within)
        memory = memory_of(node) if writes else frozenset()
        pending.extend(write.node for write in writes if not memory.isdisjoint(write.memory))
    return nodes


class SideEffects:
    """The writes of one flat graph, and what they forbid.

    Args:
        graph: the flat graph.
        kept: indices of the graph's results that outlive the call in attributes and containers.
    """

    def __init__(self, graph: fx.Graph, kept: AbstractSet[int] = frozenset()) -> None:
        nodes = body_nodes(graph)
        self._position = positions_of(nodes)
        self._writes = _writes(nodes)
        self._names = names_by_memory(graph) if self._writes else {}
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        self._kept = [value for index, value in enumerate(output.args[0]) if index in kept]

    def __bool__(self) -> bool:
        """Whether the graph has writes or kept results at all."""
        return bool(self._writes or self._kept)

    def lost(self, region: RegionPlan, of_sample: Collection[fx.Node]) -> Iterator[str]:
        """Why the region cannot be bypassed, a clause each.

        Args:
            of_sample: the region's results that continue the sample.
        """
        results = set(region.live_outs)
        place = {write: self._position[write.node] for write in self._writes}
        inside = [write for write in self._writes if region.start <= place[write] < region.end]
        after = [write for write in self._writes if place[write] >= region.end]
        yield from self._writes_across_the_border(region, inside)
        for write in self._writes:
            compared = region.reference.inputs if region.reference is not None else ()
            if region.blocks[0].start <= place[write] < region.start and _share_memory(write, compared):
                yield f"{write.node.name} writes in place to the hidden states before they are compared"
        for write in after:
            if _share_memory(write, results) and self._is_read_after(write):
                yield f"{write.node.name} writes in place to a result of the region"
        sound = {
            result
            for result, has_base in zip(region.live_outs, region.continued, strict=True)
            if has_base
            and result in of_sample
            and not any(_share_memory(write, [result]) for write in inside)
            and self._is_used_beside_writes(result, region.end)
        }
        for write in after:
            arguments = [name for name in self._names_of(write.memory) if name not in self._position]
            if arguments and _sources(write.node.all_input_nodes, results) - sound:
                yield f"its blocks write to {source_name(arguments[0])}, and a bypassed block would not"
        if _sources(self._kept, results) - sound:
            yield "its blocks keep values in attributes or containers, and a bypassed block would keep old ones"

    def _writes_across_the_border(self, region: RegionPlan, inside: Sequence[Write]) -> Iterator[str]:
        """Writes in the region to memory from outside; the hoisted nodes count as outside."""
        hoisted = set(region.hoisted)

        def side(node: fx.Node) -> str:
            if node in hoisted:
                return "hoisted"
            position = self._position.get(node, -1)
            return "before" if position < region.start else "inside" if position < region.end else "after"

        for write in inside:
            names = self._names_of(write.memory)
            outside = [name for name in names if side(name) not in (side(write.node), "after")]
            if outside:
                yield f"{write.node.name} writes in place to {source_name(outside[0])}, made outside the region"
            readers = {user for name in names for user in name.users if user < write.node}
            if side(write.node) == "hoisted" and any(side(user) == "inside" for user in readers):
                yield f"{write.node.name} writes in place to a value that the region reads before"

    def _names_of(self, memory: frozenset[Memory]) -> list[fx.Node]:
        return [name for each in memory for name in self._names[each]]

    def _is_read_after(self, write: Write) -> bool:
        return any(write.node < user for name in self._names_of(write.memory) for user in name.users)

    def _is_used_beside_writes(self, result: fx.Node, end: int) -> bool:
        """Whether a node after the region uses the result for anything but to write it to a graph input."""
        writers = {write.node for write in self._writes}
        return any(self._position.get(user, end) >= end and user not in writers for user in result.users)


def _writes(nodes: Iterable[fx.Node]) -> list[Write]:
    return [Write(node, target, memory_of(target)) for node in nodes for target in written_by(node)]


def _share_memory(write: Write, nodes: Iterable[fx.Node]) -> bool:
    return any(not write.memory.isdisjoint(memory_of(node)) for node in nodes)


def _sources(nodes: Iterable[fx.Node], among: AbstractSet[fx.Node]) -> set[fx.Node]:
    """Those of `among` that `nodes` are, or depend on, up to the nearest ones."""
    values: set[fx.Node] = set()
    pending, visited = list(nodes), set[fx.Node]()
    while pending:
        source = pending.pop()
        if source in visited:
            continue
        visited.add(source)
        if source in among:
            values.add(source)
        else:
            pending.extend(source.all_input_nodes)
    return values
