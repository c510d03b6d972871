"""Adds further forms of each region to a graph with regions. The run time chooses among them at each step.

    region_call.run(entry, compute, inputs, bases, base_inputs)
 -> region_call.run(entry, compute, inputs, bases, base_inputs, ((("low",), low), (("attention",), ...), ...))

A pass adds one difference. It gives a form with the difference to each form that is there, so that the differences of
several passes combine freely. All forms take the same inputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import fx

from .base import make_module

LOW, ATTENTION = "low", "attention"
"""What forms differ in: quantized copies of weights, and replaced attention."""
Change: TypeAlias = Callable[[fx.Graph], Counter[str]]
"""Changes the graph of a piece in place, and counts what it changed, by names."""


def add_forms(gm: fx.GraphModule, difference: str, change: Change) -> Counter[str]:
    """For each form of each region, add the form whose pieces are changed. Returns the changes in all first forms.

    A form without a change is left out.
    """
    total: Counter[str] = Counter()
    for number, call in enumerate(gm.graph.find_nodes(op="call_method", target="run")):
        region_call, entry, compute, inputs, bases, base_inputs, *more = cast("tuple[Any, ...]", call.args)
        forms = more[0] if more else ()
        added = []
        for names, form in (((), compute), *forms):
            changed, counts = _changed(cast(fx.GraphModule, gm.get_submodule(form.target)), difference, change)
            if not counts:
                continue
            total += Counter() if names else counts
            names = tuple(sorted((*names, difference)))
            title = f"region_{number}_{'_'.join(names)}"
            gm.add_module(title, changed)
            with gm.graph.inserting_before(call):
                added.append((names, gm.graph.get_attr(title)))
        if added:
            call.args = (region_call, entry, compute, inputs, bases, base_inputs, (*forms, *added))
    return total


def _changed(region: fx.GraphModule, name: str, change: Change) -> tuple[fx.GraphModule, Counter[str]]:
    """A copy of a region's graph module, whose pieces are changed copies, and the changes."""
    form, total = make_module(region, copy.deepcopy(region.graph), name), Counter[str]()
    for node in form.graph.find_nodes(op="call_module"):
        piece = cast(fx.GraphModule, region.get_submodule(str(node.target)))
        twin = make_module(piece, copy.deepcopy(piece.graph), str(node.target))
        counts = change(twin.graph)
        if counts:
            setattr(form, str(node.target), twin)
        total += counts
    return form, total
