"""Takes samples of tensors, to tell whether their contents have changed, or are the same on another rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from cachedit_fx.runtime.guard import on_host

SAMPLES = 64
"""Samples of a weight."""


def samples_of(tensors: Iterable[Any], count: int = SAMPLES) -> list[torch.Tensor]:
    """At most `count` elements of each tensor, spread over it: a vector for each dtype and device."""
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for part in (part for tensor in tensors for part in parts_of(tensor)):
        if part.numel():
            samples[part.dtype, part.device].append(_sample(part, count))
    return [torch.cat(vectors).detach() for vectors in samples.values()]


def differ(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether samples differ: a single bool, on their device. NaNs at the same place are equal."""
    forms = [[(each.shape, each.dtype, each.device) for each in samples] for samples in (before, now)]
    if forms[0] != forms[1]:
        return torch.tensor(True)
    flags = [((one != two) & ~(one.isnan() & two.isnan())).any() for one, two in zip(before, now, strict=True)]
    home = next((flag.device for flag in flags if not on_host(flag)), None)  # a move to the host would wait
    return torch.stack([flag.to(home or flag.device) for flag in flags]).any() if flags else torch.tensor(False)


def parts_of(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensor, or all parts of a tensor of tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
        yield tensor


def _sample(part: torch.Tensor, most: int) -> torch.Tensor:
    count = min(most, part.numel())
    step = max(1, (part.numel() - 1) // max(1, count - 1))  # not a whole number of rows, as a rule
    if part.is_contiguous():
        return part.as_strided((count,), (step,))
    return part.reshape(-1)[::step][:count]
