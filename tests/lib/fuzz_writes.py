"""Ways to write in place to a stream, by the name that a `Spec` has for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _through_slice(x: Tensor, change: Tensor) -> Tensor:
    x[:, :1] = x[:, :1] + change[:, :1]
    return x + change


def _into_view(x: Tensor, change: Tensor) -> Tensor:
    head = x[..., : x.shape[-1] // 2]
    head += change[..., : x.shape[-1] // 2]
    return x + change


def _fresh_buffer(x: Tensor, change: Tensor) -> Tensor:
    result = torch.empty_like(x)
    half = x.shape[-1] // 2
    result[..., :half] = x[..., :half] + change[..., :half]
    result[..., half:] = x[..., half:] - change[..., half:]
    return result


def _add_to(x: Tensor, change: Tensor) -> Tensor:
    x += change
    return x


def _add_to_clone(x: Tensor, change: Tensor) -> Tensor:
    x = x.clone()
    x += change
    return x


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, change: x + change,
    "replace": lambda x, change: change,
    "iadd": _add_to,
    "add_": lambda x, change: x.add_(change),
    "mul_add_": lambda x, change: x.mul_(0.75).add_(change),
    "onto change": lambda x, change: change.add_(x),
    "clone": _add_to_clone,
    "buffer": _fresh_buffer,
    "slice": _through_slice,
    "view": _into_view,
    "gate": lambda x, change: torch.lerp(x, change, 0.3),
}

IN_PLACE = frozenset({"iadd", "add_", "mul_add_", "slice", "view"})
"""Those that write to the stream that they are given."""

PARTLY_IN_PLACE = frozenset({"slice", "view"})
"""Those that write to part of the stream, and give another tensor."""
