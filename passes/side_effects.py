"""Tells what a bypassed region would lose beside its results: writes, and the identity of memory.

    k_cache[:, 3:5] = k      in block 4; k depends on the hidden states. A bypass would keep the keys of another step.
    self.calls += 1          in block 4, on nothing carried: hoisted out of the region, so that it always runs.

Normalized writes to graph inputs stand at the graph's end. The written values are results of the region then. A result
may be written to an input only if it is a stream that the rest of the model uses as well, as hidden states are that
blocks change in place: the caller finds in them the values that the model went on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import fx

from .find_timestep import source_name
from .graph_aliases import Memory, memory_of, names_by_memory, written_by
from .graph_values import live_outs, positions_of


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
        nodes: all body nodes.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._nodes = nodes
        self._position = positions_of(nodes)
        self._writes = _writes(nodes)
        self._names = names_by_memory(nodes[0].graph) if self._writes else {}

    def lost(
        self,
        start: int,
        end: int,
        hoisted: AbstractSet[fx.Node],
        results: Sequence[fx.Node],
        continued: Sequence[bool],
        head: int,
        reference: Sequence[fx.Node],
    ) -> Iterator[str]:
        """Why the region of the nodes [start, end) cannot be bypassed, a clause each.

        Args:
            hoisted: nodes of the region that always run, before it.
            results: its live-outs.
            continued: for each result, whether it has a base.
            head: the position of the first block.
            reference: values from before the first block that H_F is compared with.
        """
        inside = [write for write in self._writes if start <= self._position[write.node] < end]
        before = [write for write in self._writes if head <= self._position[write.node] < start]
        after = [write for write in self._writes if self._position[write.node] >= end]
        group = {node: node in hoisted for node in self._nodes[start:end]}
        for write in inside:
            for name in self._names_of(write.memory):
                if self._position.get(name, -1) < end and group.get(name) is not group[write.node]:
                    yield f"{write.node.name} writes in place to {source_name(name)}, made outside the region"
            readers = {user for name in self._names_of(write.memory) for user in name.users if user < write.node}
            if write.node in hoisted and any(group.get(user) is False for user in readers):
                yield f"{write.node.name} writes in place to a value that the region reads before"
        for write in before:
            if any(not write.memory.isdisjoint(memory_of(node)) for node in reference):
                yield f"{write.node.name} writes in place to the hidden states before they are compared"
        for write in after:
            for result in results:
                if not write.memory.isdisjoint(memory_of(result)) and self._is_read_after(write):
                    yield f"{write.node.name} writes in place to {result.name}, a result of the region"
        fresh = frozenset(memory for write in inside for memory in write.memory)
        sound = {
            result
            for result, has_base in zip(results, continued, strict=True)
            if has_base and fresh.isdisjoint(memory_of(result)) and self._is_used_beside_writes(result, end)
        }
        for write in after:
            arguments = [name for name in self._names_of(write.memory) if name not in self._position]
            stale = [value for value in _sources(write.node, set(results)) if value not in sound]
            if arguments and stale:
                yield f"its blocks write to {source_name(arguments[0])}, and a bypassed block would not"

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


def _sources(node: fx.Node, among: AbstractSet[fx.Node]) -> set[fx.Node]:
    """Those of `among` that `node` depends on, up to the nearest ones."""
    values: set[fx.Node] = set()
    pending, visited = list(node.all_input_nodes), {node}
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
