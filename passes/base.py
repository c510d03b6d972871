"""The contract of the passes: analyses, rewrites, and the facts between them.

    Analysis   graph, facts ──► one fact                 pure: repeated whenever a rewrite has made its fact stale
    Rewrite    graph, facts ──► graph, matches, facts    says which facts stay true: `preserves`

A fact is a frozen dataclass, found by its type. Passes name the facts that they need. The manager finds the order,
drops the facts that a rewrite made stale, and analyses anew on demand. Options are bound in a pass's constructor, so
the manager knows no pass's arguments.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from .graph_values import meta_of_value

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class FlatGraph:
    """Fact: the graph is as dynamo captured it, no block outlined. Every run of the manager starts with it.

    A rewrite of the flat graph requires and preserves this fact. The rewrite then runs before blocks are outlined, at
    any place in the list. It also preserves `normalize.Normalized`, unless it writes in place.
    """


class Interface:
    """Base of a fact about the inputs of the graph. No rewrite drops such a fact: inputs are what callers pass."""


class Facts:
    """The facts that are known of one graph, by their types."""

    def __init__(self, facts: Iterable[Any] = ()) -> None:
        self._by_kind: dict[type, Any] = {}
        for fact in facts:
            self.put(fact)

    def __contains__(self, kind: type) -> bool:
        return kind in self._by_kind

    def __getitem__(self, kind: type[Kind]) -> Kind:
        fact: Kind = self._by_kind[kind]
        return fact

    def get(self, kind: type[Kind]) -> Kind | None:
        """The fact of this type; None if it is not known."""
        return self._by_kind.get(kind)

    def put(self, fact: Any) -> None:
        """Enter a fact under its type."""
        self._by_kind[type(fact)] = fact

    def keep(self, kinds: Collection[type]) -> None:
        """Drop all facts but these, and those about the graph's inputs."""
        self._by_kind = {
            kind: fact for kind, fact in self._by_kind.items() if kind in kinds or issubclass(kind, Interface)
        }

    @property
    def kinds(self) -> tuple[type, ...]:
        """The types of the known facts."""
        return tuple(self._by_kind)


class Pass(ABC):
    """An analysis or a rewrite.

    Attributes:
        name: the pass in `options={"passes": {name: False}}`, in the log, and in its artifacts.
        requires: facts that it cannot do without, one at least. If one cannot be established, the pass is skipped.
        uses: facts that it reads if they are known; their analyses run first.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type, ...]] = ()
    uses: ClassVar[tuple[type, ...]] = ()


class Analysis(Pass, Generic[Kind]):
    """Learns one fact about a graph and leaves the graph as it is.

    Attributes:
        provides: the type of the fact.
    """

    provides: ClassVar[type]

    @abstractmethod
    def run(self, gm: fx.GraphModule, facts: Facts) -> Kind | None:
        """The fact; None if the graph does not show it."""


@dataclass(frozen=True)
class Rewritten:
    """The result of a rewrite: the graph module to go on with, the number of places it matched, new facts."""

    graph_module: fx.GraphModule
    matches: int
    facts: tuple[Any, ...] = ()


class Rewrite(Pass):
    """Changes a graph.

    Attributes:
        provides: types of the facts that it makes true. With matches, it hands back all of them.
        preserves: types of the facts that are still true after it. The manager drops all others if it matched.
    """

    provides: ClassVar[tuple[type, ...]] = ()
    preserves: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        """Rewrite `gm`. If nothing matches, return it untouched with a count of zero."""


@dataclass(frozen=True)
class Traced:
    """Knowledge from outside the graph: about the module that was captured, and the Python frame that was traced.

    The graph may be the whole module or a part of it.

    Attributes:
        sample: name of the module's first argument, which is the noisy sample. If None, the sample is the graph input
            that looks most like the output.
        parameters: numbers in all its weights.
        largest: numbers in the weights of its largest ModuleList.
        numbers: arguments of the frame that are Python numbers, by name. Dynamo makes them constants of the graph.
        kept: indices of the graph's results that the frame puts into attributes and containers that outlive it.
        is_branch: whether the call that is captured is one of a step's branches of guidance, by its pipeline's word.
    """

    sample: str | None = None
    parameters: int = 0
    largest: int = 0
    numbers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    kept: frozenset[int] = frozenset()
    is_branch: bool = False

    @classmethod
    def of(cls, module: torch.nn.Module) -> Traced:
        """Read a module before any of its graphs is captured."""

        def count(container: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in container.parameters())

        sample = next(iter(inspect.signature(module.forward).parameters), None)
        containers = (child for child in module.modules() if isinstance(child, torch.nn.ModuleList))
        return cls(sample, count(module), max(map(count, containers), default=0))

    def in_frame(self, numbers: Mapping[str, float], kept: frozenset[int]) -> Traced:
        """A copy for a frame with these numbers and kept results."""
        return replace(self, numbers=MappingProxyType(dict(numbers)), kept=kept)


NOTHING_KNOWN = Traced()


def make_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module whose code is generated when the module is first called or printed.

    Most pieces of a model are identical to another one, and are never called. Generating their code took most of the
    time of all passes together.
    """
    return _LazyGraphModule(root, graph, name)


def module_of(
    root: torch.nn.Module,
    name: str,
    inputs: Iterable[fx.Node],
    members: Iterable[fx.Node],
    results: Iterable[fx.Node],
    copy: Callable[[fx.Graph, fx.Node, Callable[[fx.Node], fx.Node]], fx.Node] = fx.Graph.node_copy,
) -> fx.GraphModule:
    """A graph module that computes `results` from `inputs` by copies of `members`, which are in graph order.

    Args:
        root: holds what members name by `get_attr` or call.
        copy: copies a member into a graph, with the nodes there that a function gives for its inputs.
    """
    graph = fx.Graph()
    local: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        local[node] = graph.placeholder(node.name)
        local[node].meta = meta_of_value(node)
    for node in members:
        local[node] = copy(graph, node, local.__getitem__)
        local[node].meta = dict(node.meta)
    graph.output(tuple(local[node] for node in results))
    return make_module(root, graph, name)
