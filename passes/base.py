"""The interface that every pass shares.

A pass takes a graph module and returns a graph module with the number of matches. What one pass learns and another
needs travels as a named *fact* in `GraphModule.meta`: a pass names the facts that it requires, uses if they are there,
and provides, and the manager finds the order. Options are bound in the constructor, so that whoever runs the passes
knows no pass's arguments.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

META_KEY = "cachedit_fx"


@dataclass(frozen=True)
class PassResult:
    """What a pass hands back: the graph module to go on with, and how many places it matched."""

    graph_module: fx.GraphModule
    matches: int


class Pass(ABC):
    """One analysis or one rewrite of a dynamo-level graph.

    Attributes:
        name: what `options={"passes": {name: False}}` calls it.
        requires: facts without which it is skipped.
        uses: facts that it reads where they are there; whoever provides them runs first.
        provides: facts that it leaves in the graph module's meta.
        conflicts: names of passes that cannot run beside it.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Analyse or rewrite `gm`. No match: return it untouched with a count of zero."""


def facts(gm: fx.GraphModule) -> dict[str, Any]:
    """The facts that passes have left on this graph module."""
    result: dict[str, Any] = gm.meta.setdefault(META_KEY, {})
    return result


def make_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module whose code is generated when it is first called or printed.

    Of the pieces of a model most are twins of another, and never called: generating their code took most of the time
    of all passes together.
    """
    return _LazyGraphModule(root, graph, name)


@dataclass(frozen=True)
class ModuleFacts:
    """What is known of a module ahead of its graphs.

    Attributes:
        sample: name of its first argument, which is the noisy sample; None: the sample is known by its looks.
        parameters: numbers in all its weights.
        largest: numbers in the weights of its largest ModuleList.
    """

    sample: str | None = None
    parameters: int = 0
    largest: int = 0

    @classmethod
    def of(cls, module: torch.nn.Module) -> ModuleFacts:
        def count(part: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in part.parameters())

        sample = next(iter(inspect.signature(module.forward).parameters), None)
        containers = (part for part in module.modules() if isinstance(part, torch.nn.ModuleList))
        return cls(sample, count(module), max(map(count, containers), default=0))


NOTHING_KNOWN = ModuleFacts()
