"""Steps of a model that is checked: its arguments at another timestep, and the tensors that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.passes.find_timestep import NAMES

Inputs = Callable[[int], dict[str, Any]]
"""Keyword arguments of one forward at size 1 or 2, two resolutions; the same at every call."""

Make = Callable[[], tuple[nn.Module, Inputs]]

FIRST, LATER = 1.0, 0.9
"""A step's timestep, over the first step's."""
NEVER = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0, enable_separate_cfg=False)
"""A cache at threshold 0, whose regions are there and never reused."""


def tensors(result: Any) -> list[torch.Tensor]:
    """Copies of the tensors in what a module returned, in order."""
    return [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether these are the same tensors, to the bit, and there is one at least."""
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def at_timestep(arguments: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The arguments of another step: every timestep scaled down. Without a timestep they stay as they are."""
    return {**arguments, **{name: _scaled(arguments[name], scale) for name in timesteps_of(arguments)}}


def timesteps_of(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that are timesteps, by their names."""
    return [name for name in arguments if (name in NAMES or "time" in name) and arguments[name] is not None]


def _scaled(value: Any, scale: float) -> Any:
    return (value * scale).to(value.dtype) if isinstance(value, torch.Tensor) else value * scale
