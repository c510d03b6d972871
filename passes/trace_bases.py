"""Traces a value back to what it would be if every block handed its carried values on unchanged: its base.

Block outputs become the matching block inputs, and the data movement between them (streams concatenated, sliced) is
copied into a small graph of its own, the continuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import fx
from torch.fx.node import map_arg

from .graph_values import (
    is_data_movement,
    tensor_of,
)


@dataclass(frozen=True)
class Continuation:
    """The bases of some values as a small graph: `inputs` in, one result per continued value out."""

    inputs: tuple[fx.Node, ...]
    graph: fx.Graph

    @property
    def is_trivial(self) -> bool:
        """Whether every base is simply one of the inputs."""
        return all(node.op in ("placeholder", "output") for node in self.graph.nodes)


class BaseTracer:
    """Builds the graph of bases: values made before `start` are inputs, carried outputs become carried inputs, and
    data movement in between is copied."""

    def __init__(
        self,
        handed_on: Mapping[fx.Node, fx.Node],
        position: Mapping[fx.Node, int],
        start: int,
        hoisted: AbstractSet[fx.Node] = frozenset(),
    ) -> None:
        self._handed_on = handed_on
        self._position = position
        self._start = start
        self._hoisted = hoisted
        self._graph = fx.Graph()
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._results: list[fx.Node] = []
        self._first_body: fx.Node | None = None

    def add(self, value: fx.Node) -> bool:
        """Trace `value` back; False where it continues nothing."""
        if tensor_of(value) is None or not self._can(value):
            return False
        self._results.append(self._copy(value))
        return True

    def finish(self) -> Continuation:
        self._graph.output(tuple(self._results))
        return Continuation(tuple(self._inputs), self._graph)

    def _is_outside(self, node: fx.Node) -> bool:
        return self._position.get(node, -1) < self._start or node in self._hoisted

    def _can(self, node: fx.Node) -> bool:
        if self._is_outside(node):
            return True
        if node in self._handed_on:
            return self._can(self._handed_on[node])
        return is_data_movement(node) and all(self._can(item) for item in node.all_input_nodes)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        if self._first_body is None:
            result = self._graph.placeholder(node.name)
        else:
            with self._graph.inserting_before(self._first_body):
                result = self._graph.placeholder(node.name)
        result.meta = dict(node.meta)
        return result

    def _copy(self, node: fx.Node) -> fx.Node:
        if self._is_outside(node):
            if node not in self._inputs:
                self._inputs[node] = self._placeholder(node)
            return self._inputs[node]
        if node in self._handed_on:
            return self._copy(self._handed_on[node])
        if node not in self._copies:
            args, kwargs = map_arg((node.args, node.kwargs), self._copy)
            copy = self._graph.create_node(node.op, node.target, args, kwargs, node.name)
            copy.meta = dict(node.meta)
            self._copies[node] = copy
            self._first_body = self._first_body or copy
        return self._copies[node]
