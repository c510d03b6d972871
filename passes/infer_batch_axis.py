"""Infers how the chain's values can be cut along the batch, so that two halves of the ranks share the samples.

    hidden_states  [2, 1024, 3072]      cut along axis 0      one sample each
    attention(q, k, v)                  no communication      samples do not meet

It is `infer_sequence_axes` with one axis to choose from. There is no fact if samples meet anywhere in the chain, or if
the first axis holds something else: something would have to be sent in every block then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .base import Facts
from .infer_sequence_axes import InferSequenceAxes, SequenceAxes


@dataclass(frozen=True)
class BatchAxes(SequenceAxes):
    """Fact: how the nodes from the chain's first one on run on parts of the batch."""


class InferBatchAxis(InferSequenceAxes):
    """Follows parts of the batch to the end of the graph.

    Args:
        ranks: how many share the batch.
    """

    name: ClassVar[str] = "infer_batch_axis"
    provides: ClassVar[type] = BatchAxes
    axes: ClassVar[slice] = slice(0, 1)

    def run(self, gm: fx.GraphModule, facts: Facts) -> SequenceAxes | None:
        axes = super().run(gm, facts)
        return None if axes is None or axes.exchanges or axes.chain_gathers else axes
