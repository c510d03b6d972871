"""Gives each region further forms, in which the calls that `replace_attention` marked run in another back end.

    region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,))
 -> region_0 = region_call.run(entry_0, self.region_0_compute, (inputs, h), self.region_0_bases, (h,),
                               ((("attention",), self.region_0_attention),))

The first form keeps the model's own attention, and so does everything outside the regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .base import Facts, Interface, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .gather_inputs import GatheredInputs
from .infer_dependence import Dependence
from .insert_cache_branch import CacheBranch
from .insert_low_precision import LowPrecision
from .plan_regions import RegionReport
from .region_forms import ATTENTION, add_forms
from .replace_attention import REPLACEMENT


@dataclass(frozen=True)
class AttentionByStep(Interface):
    """Fact: the regions have forms with replaced attention.

    Attributes:
        calls: name of a back end -> how many calls it takes in such a form, all regions together.
    """

    calls: Mapping[str, int]


class InsertAttentionForms(Rewrite):
    """Adds `region_k_attention` to each region with marked calls, and such a form to each form that is there."""

    name: ClassVar[str] = "insert_attention_forms"
    requires: ClassVar[tuple[type, ...]] = (CacheBranch,)
    uses: ClassVar[tuple[type, ...]] = (GatheredInputs, LowPrecision)
    provides: ClassVar[tuple[type, ...]] = (AttentionByStep,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        counts = add_forms(gm, ATTENTION, _replace_marked)
        return Rewritten(gm, counts.total(), (AttentionByStep(counts),) if counts else ())


def _replace_marked(piece: fx.Graph) -> Counter[str]:
    """Let marked calls run in their back ends. Name of a back end -> the number of its calls."""
    counts: Counter[str] = Counter()
    for node in piece.nodes:
        if REPLACEMENT in node.meta:
            name, node.target = node.meta[REPLACEMENT]
            counts[name] += 1
    return counts
