"""A toy of some width, and its steps in both precisions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from cachedit_fx import DBCacheConfig, PrecisionConfig, enable_cache, quantize

from .toys import Toy, make, noise

NEVER = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0)
TIMES = (900.0, 700.0, 500.0, 300.0)
TEXT = noise(1, 3, width=32, seed=2)
ALTERNATE = PrecisionConfig("int8", full_steps_mask=(1, 0, 1, 0))


def wide(kind: type[nn.Module] = Toy, blocks: int = 3) -> Any:
    return make(kind, width=32, blocks=blocks).requires_grad_(False)


def enabled(model: Any, precision: Any = ALTERNATE, cache: Any = NEVER, **options: Any) -> Any:
    return enable_cache(model, cache, precision=precision, **{"inner_backend": "eager"} | options)


@torch.no_grad()
def steps(model: Any, text: torch.Tensor = TEXT) -> list[torch.Tensor]:
    """The results of a generation on one sample."""
    return [model(noise(width=32), torch.tensor([time]), text) for time in TIMES]


def are_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(left, right, strict=True)]


def quantized(model: Any, **arguments: Any) -> Any:
    """A copy whose blocks but the first are quantized in place."""
    twin = copy.deepcopy(model)
    quantize(twin, arguments.pop("quant_type", "int8"), **{"exclude": ["blocks.0"]} | arguments)
    return twin
