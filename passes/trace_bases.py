"""Traces a value back to its base: the value that it would have if every block handed its carried values on unchanged.

    block 2's output, joined with text, sliced     ->     block 0's input, joined with text, sliced

A block's outputs become its matching inputs. Data movement between blocks (streams concatenated, sliced) is copied into
a small graph, the continuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import fx
from torch.fx.node import map_arg

from .graph_values import is_data_movement, meta_of_value, tensor_of


@dataclass(frozen=True)
class Continuation:
    """The bases of some values as a small graph: from `inputs` to one result for each continued value."""

    inputs: tuple[fx.Node, ...]
    graph: fx.Graph

    @property
    def is_trivial(self) -> bool:
        """Whether every base is simply one of the inputs."""
        return all(node.op in ("placeholder", "output") for node in self.graph.nodes)


class BaseTracer:
    """Builds the graph of bases.

    Args:
        block_inputs: a carried value that leaves a block -> the value that entered the block in the same place.
        position: body node -> its position.
        start: values made before this position are inputs of the bases.
        hoisted: nodes that run before the region, and count as made before `start`.
    """

    def __init__(
        self,
        block_inputs: Mapping[fx.Node, fx.Node],
        position: Mapping[fx.Node, int],
        start: int,
        hoisted: AbstractSet[fx.Node] = frozenset(),
    ) -> None:
        self._block_inputs = block_inputs
        self._position = position
        self._start = start
        self._hoisted = hoisted
        self._graph = fx.Graph()
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._results: list[fx.Node] = []
        self._first_body: fx.Node | None = None

    def add(self, value: fx.Node) -> bool:
        """Trace `value` back; False if it continues nothing."""
        if tensor_of(value) is None or not self._has_base(value):
            return False
        self._results.append(self._copy(value))
        return True

    def finish(self) -> Continuation:
        """The bases of all values added with success, in the order of adding."""
        self._graph.output(tuple(self._results))
        return Continuation(tuple(self._inputs), self._graph)

    def _is_outside(self, node: fx.Node) -> bool:
        return self._position.get(node, -1) < self._start or node in self._hoisted

    def _has_base(self, node: fx.Node) -> bool:
        if self._is_outside(node):
            return True
        if node in self._block_inputs:
            return self._has_base(self._block_inputs[node])
        return is_data_movement(node) and all(self._has_base(source) for source in node.all_input_nodes)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        if self._first_body is None:
            result = self._graph.placeholder(node.name)
        else:
            with self._graph.inserting_before(self._first_body):
                result = self._graph.placeholder(node.name)
        result.meta = meta_of_value(node)
        return result

    def _copy(self, node: fx.Node) -> fx.Node:
        if self._is_outside(node):
            if node not in self._inputs:
                self._inputs[node] = self._placeholder(node)
            return self._inputs[node]
        if node in self._block_inputs:
            return self._copy(self._block_inputs[node])
        if node not in self._copies:
            args, kwargs = map_arg((node.args, node.kwargs), self._copy)
            copy = self._graph.create_node(node.op, node.target, args, kwargs, node.name)
            copy.meta = dict(node.meta)
            self._copies[node] = copy
            self._first_body = self._first_body or copy
        return self._copies[node]
