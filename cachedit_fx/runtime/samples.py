"""Takes samples of tensors, to tell whether their contents have changed, or are the same on another rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

SAMPLES = 64
"""Samples of a weight."""


def samples_of(tensors: Iterable[Any], count: int = SAMPLES) -> list[torch.Tensor]:
    """At most `count` elements of each tensor, spread over it: a vector for each dtype and device."""
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for part in (part for tensor in tensors for part in _parts_of(tensor)):
        if part.numel():
            samples[part.dtype, part.device].append(_sample(part, count))
    return [torch.cat(vectors).detach() for vectors in samples.values()]


def _parts_of(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensor, or all parts of a tensor of tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts_of(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
        yield tensor


def _sample(part: torch.Tensor, most: int) -> torch.Tensor:
    count = min(most, part.numel())
    step = max(1, (part.numel() - 1) // max(1, count - 1))  # not a whole number of rows, as a rule
    if part.is_contiguous():
        return part.as_strided((count,), (step,))
    return part.reshape(-1)[::step][:count]
