"""Gives all ranks of a group the tensors that its first rank came with: one broadcast a call, of all of them.

    rank 0   noise, prompt ─► bytes ─► broadcast ─► noise, prompt of rank 0
    rank 1   noise, prompt            ──────┘  └──► noise, prompt of rank 0

A rank's scheduler goes on from its own noise, so the tensors are sent at every step. The first rank takes copies too:
what is kept for a tensor is then kept on all ranks, or on none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cachedit_fx.runtime.guard import read_back
from cachedit_fx.runtime.ranks import Ranks, device_among

KEPT = 4
"""Latest tensors of an input that are kept: the conditions of a step's branches come in turn."""


class SharedInputs:
    """The inputs of one graph, as all ranks take them from the first one.

    Args:
        ranks: those that share a sample.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._kept: dict[int, list[torch.Tensor]] = {}
        """Number of an input -> its latest tensors, the latest one first."""

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first rank's tensors. All ranks must call it together, with tensors of equal shapes, dtypes and devices.

        A tensor with the contents of a kept one is that very object, so that hoisted values are found again.
        """
        if not tensors:
            return []
        copies = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        sent = [copy.view(-1).view(torch.uint8) for copy in copies]
        device = device_among(sent)
        whole = self.ranks.from_first(torch.cat([each.to(device) for each in sent]))
        parts = whole.split([len(each) for each in sent])
        news = [_like(own, part.to(own.device)) for own, part in zip(tensors, parts, strict=True)]
        return self._with_kept(news)

    def _with_kept(self, news: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors, or those kept ones that have equal contents. The contents are compared in one read-back."""
        candidates = [
            (number, old)
            for number, new in enumerate(news)
            for old in self._kept.get(number, ())
            if (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        ]
        flags = [(old == news[number]).all() for number, old in candidates]
        equals = read_back(flags) if flags else []
        same = {number: old for (number, old), equal in zip(candidates, equals, strict=True) if equal}
        results = [same.get(number, new) for number, new in enumerate(news)]
        for number, result in enumerate(results):
            others = [old for old in self._kept.get(number, ()) if old is not result]
            self._kept[number] = [result, *others][:KEPT]
        return results


def _like(own: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """A new tensor with these bytes, in the layout of `own`: compiled graphs expect its strides."""
    values = content.clone().view(own.dtype).view(own.shape)  # a copy is aligned, and does not hold the others' bytes
    repeated = [stride == 0 and size > 1 for stride, size in zip(own.stride(), own.shape, strict=True)]
    single = values[tuple(slice(0, 1) if each else slice(None) for each in repeated)]
    result = torch.empty_strided(single.shape, own.stride(), dtype=own.dtype, device=own.device)
    return result.copy_(single).expand(own.shape)
