"""A module as the checks of `cachedit coverage` use it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from cachedit_fx import api
from cachedit_fx.bench.coverage_steps import tensors
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.passes.replace_attention import ReplacedAttention
from cachedit_fx.runtime.registry import state_of_module
from cachedit_fx.runtime.stats import CacheStats


class Subject:
    """A module as `check` uses it: compiled under one cache config after another, called, asked what happened.

    Attributes:
        chain: name -> number of blocks, of the loops of the chain that was found.
        middle: names of the blocks that the regions bypass.
        attention: name of a back end -> how many calls of attention it takes, if the options ask for one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.chain: dict[str, int] = {}
        self.middle: set[str] = set()
        self.attention: dict[str, int] = {}
        self.note = partial(_note, self.chain, self.middle, self.attention)
        """Takes down the facts of one graph. A method would hold the module, and the module's registry holds this."""

    def compile(self, cache: DBCacheConfig | None, **options: Any) -> None:
        """As a user would. The next call captures the module, unless only the policy is another.

        The first computed call is verified, unless `options` say otherwise.
        """
        api.compile(self.module, **{"inner_backend": "eager", "cache": cache, "verify": "first"} | options)
        state = state_of_module(self.module)
        assert state is not None
        state.observe = self.note

    def __call__(self, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors that the module, as compiled, returns for these keyword arguments."""
        return tensors(self.module(**arguments))

    def summary(self) -> list[CacheStats]:
        """Statistics of the latest generation."""
        return api.summary(self.module)

    def close(self) -> None:
        """Give the module back plain."""
        api.disable_cache(self.module)
        torch.compiler.reset()


def _note(chain: dict[str, int], middle: set[str], attention: dict[str, int], facts: Facts) -> None:
    """Add the facts of one graph. Every compilation of the module finds the same."""
    detection, report, replaced = facts.get(Detection), facts.get(RegionReport), facts.get(ReplacedAttention)
    if replaced is not None:
        attention.update(replaced.calls)
    if detection is not None:
        chain.update({loop.name: loop.num_blocks for loop in detection.chain_loops})
    if report is not None:
        middle.update(block.name for region in report.regions for block in region.middle)
