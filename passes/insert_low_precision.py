"""Gives each region a second form, which runs its blocks with quantized copies of their weights.

    region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,))
 -> region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,),
                               ((("low",), self.region_0_low),))

The run time chooses at each step (`region_call.run`), and hands the second form the graph's inputs with the copies in
place. Both forms have the same code. Their pieces are compiled separately, as a copy is a tensor of another class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from .base import Facts, Interface, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .gather_inputs import GatheredInputs
from .graph_cost import bytes_of_tensors
from .graph_values import value_of
from .infer_dependence import Dependence
from .insert_cache_branch import CacheBranch
from .plan_regions import RegionReport
from .region_forms import LOW, add_forms

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

        def take_copies(piece: fx.Graph) -> Counter[str]:
            weights = [each for each in piece.find_nodes(op="placeholder") if COPY in each.meta]
            for weight in weights:
                place, fake = weight.meta[COPY]
                sizes[place] = bytes_of_tensors([fake]), bytes_of_tensors([value_of(weight)])
                weight.meta["example_value"] = fake
            return Counter(weight.name for weight in weights)

        if not add_forms(gm, LOW, take_copies):
            return Rewritten(gm, 0)
        copies, weights = (sum(column) for column in zip(*sizes.values(), strict=True))
        return Rewritten(gm, len(sizes), (LowPrecision(tuple(sorted(sizes)), copies, weights),))
