"""The interface that every pass shares.

A pass takes a graph module and returns a graph module with the number of matches. What one pass learns and another
needs travels as a named *fact* in `GraphModule.meta`: `requires` and `provides` name facts, and the manager refuses
an order in which a fact is read before it is made. Options are bound in the constructor, so that whoever runs the
passes knows no pass's arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

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
        requires: facts that must have been provided by an earlier pass.
        provides: facts that this pass leaves in the graph module's meta.
        optional: whether the user may switch it off.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[bool] = True

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Analyse or rewrite `gm`. No match: return it untouched with a count of zero."""


def facts(gm: fx.GraphModule) -> dict[str, Any]:
    """The facts that passes have left on this graph module."""
    result: dict[str, Any] = gm.meta.setdefault(META_KEY, {})
    return result
