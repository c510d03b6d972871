"""Gives each region a second form, which runs its blocks with quantized copies of their weights.

    region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,))
 -> region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,),
                               self.region_0_low)

The run time chooses at each step (`region_call.run`), and hands the second form the graph's inputs with the copies in
place. Both forms have the same code. Their pieces are compiled separately, as a copy is a tensor of another class.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import fx

from .base import Facts, Interface, Rewrite, Rewritten, make_module
from .block_loops import Detection
from .find_timestep import TimestepSource
from .gather_inputs import GatheredInputs
from .graph_cost import bytes_of_tensors
from .graph_values import value_of
from .infer_dependence import Dependence
from .insert_cache_branch import CacheBranch
from .plan_regions import RegionReport

COPY = "cachedit_copy"
"""Key in the meta of a graph input that is a weight: (the input's index, its quantized copy as a fake tensor)."""


@dataclass(frozen=True)
class LowPrecision(Interface):
    """Fact: the regions have a second form.

    Attributes:
        inputs: indices of the graph inputs that it takes copies of.
        bytes: size of the copies.
        weight_bytes: size of the weights that they are copies of. Both are kept.
    """

    inputs: tuple[int, ...] = field(repr=False)
    bytes: int
    weight_bytes: int


class InsertLowPrecision(Rewrite):
    """Adds `region_k_low` to each region whose pieces take weights with a copy."""

    name: ClassVar[str] = "insert_low_precision"
    requires: ClassVar[tuple[type, ...]] = (CacheBranch, GatheredInputs)
    provides: ClassVar[tuple[type, ...]] = (LowPrecision,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        sizes: dict[int, tuple[int, int]] = {}
        for number, call in enumerate(gm.graph.find_nodes(op="call_method", target="run")):
            region_call, entry, compute, *rest = cast("tuple[Any, ...]", call.args)
            code = cast(fx.GraphModule, gm.get_submodule(compute.target))
            low, own_sizes = _low_form(code)
            if own_sizes:
                name = f"region_{number}_low"
                gm.add_module(name, low)
                with gm.graph.inserting_before(call):
                    call.args = (region_call, entry, compute, *rest, gm.graph.get_attr(name))
                sizes |= own_sizes
        if not sizes:
            return Rewritten(gm, 0)
        gm.recompile()
        copies, weights = (sum(column) for column in zip(*sizes.values(), strict=True))
        return Rewritten(gm, len(sizes), (LowPrecision(tuple(sorted(sizes)), copies, weights),))


def _low_form(code: fx.GraphModule) -> tuple[fx.GraphModule, dict[int, tuple[int, int]]]:
    """A region's code, its pieces taking copies of weights; the graph inputs that have copies -> bytes of both."""
    low = make_module(code, copy.deepcopy(code.graph), "low")
    sizes: dict[int, tuple[int, int]] = {}
    for node in low.graph.find_nodes(op="call_module"):
        piece = cast(fx.GraphModule, code.get_submodule(str(node.target)))
        form = make_module(piece, copy.deepcopy(piece.graph), str(node.target))
        weights = [each for each in form.graph.find_nodes(op="placeholder") if COPY in each.meta]
        for weight in weights:
            place, fake = weight.meta[COPY]
            sizes[place] = bytes_of_tensors([fake]), bytes_of_tensors([value_of(weight)])
            weight.meta["example_value"] = fake
        if weights:
            setattr(low, str(node.target), form)
    return low, sizes
