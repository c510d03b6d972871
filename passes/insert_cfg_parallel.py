"""Lets two halves of the ranks compute the halves of a batch: the two branches of guidance, if a pipeline joins them.

    y = blocks(hidden [2, 1024, 3072])     ->     y = gather(blocks(cut(hidden, 0) [1, 1024, 3072]), 0)

It carries out what `infer_batch_axis` has planned, as `insert_ulysses` does, and before it: that one cuts the tokens of
what is left of the batch. A batch of one sample stays as it is: then ranks share the calls of a step
(`runtime.branches`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .base import Facts, FlatGraph, Interface, Rewritten
from .block_loops import Detection
from .infer_batch_axis import BatchAxes
from .insert_ulysses import InsertUlysses
from .normalize import Normalized


@dataclass(frozen=True)
class BatchParallel(Interface):
    """Fact: two halves of a group's ranks call the graph together, with equal inputs, and get equal results.

    Attributes:
        group: the name of the group of a rank and its counterpart in the other half.
        share: the share of the work of the chain's linear layers that the halves divide, from 0 to 1.
    """

    group: str
    share: float

    @property
    def note(self) -> str:
        """A sentence for people."""
        return f"cfg_parallel: the ranks divide the batch, {self.share:.0%} of the work of the chain's linear layers"


class InsertCfgParallel(InsertUlysses):
    """Cuts the batch, and gathers it behind the chain.

    Args:
        group: the name of the process group.
    """

    name: ClassVar[str] = "insert_cfg_parallel"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection, BatchAxes)
    provides: ClassVar[tuple[type, ...]] = (BatchParallel,)

    def __init__(self, group: str) -> None:
        super().__init__(group)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        axes = facts[BatchAxes]
        self.rewrite(gm, axes, facts[Detection])
        return Rewritten(gm, len(axes.steps), (BatchParallel(self.group, axes.share),))
