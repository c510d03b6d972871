"""Statistics under cache-dit's names: one entry for each block list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachedit_fx import api
from cachedit_fx.compat.adapters import adapter_of
from cachedit_fx.compat.configs import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBPruneConfig,
)
from cachedit_fx.compat.kept import kept_of
from cachedit_fx.compat.loaders import load_configs
from cachedit_fx.compat.parallelism import ParallelismConfig
from cachedit_fx.compat.quantization import QuantizeConfig
from cachedit_fx.compat.translation import calibrator_config_of, config_of
from cachedit_fx.config.options import Options
from cachedit_fx.runtime.registry import states_of
from cachedit_fx.runtime.stats import BranchStats
from cachedit_fx.runtime.stats import CacheStats as OwnStats


@dataclass
class CacheStats:
    """The latest generation of one block list.

    Names with `cfg_` are about the second CFG branch. Steps are keys as strings. With DBPrune `residual_diffs` has a
    list for each step, one difference for each block compared.
    """

    cache_options: dict[str, Any] = field(default_factory=dict)
    """`cache_config` and `calibrator_config`; empty without a cache."""
    cached_steps: list[int] = field(default_factory=list)
    residual_diffs: dict[str, Any] = field(default_factory=dict)
    cfg_cached_steps: list[int] = field(default_factory=list)
    cfg_residual_diffs: dict[str, Any] = field(default_factory=dict)
    accumulated_cached_steps: int = 0
    cfg_accumulated_cached_steps: int = 0
    accumulated_executed_steps: int = 0
    accumulated_transformer_executed_steps: int = 0
    """Calls of the transformer: steps of all branches."""
    pruned_steps: list[int] = field(default_factory=list)
    pruned_blocks: list[int] = field(default_factory=list)
    actual_blocks: list[int] = field(default_factory=list)
    pruned_ratio: float | None = None
    cfg_pruned_steps: list[int] = field(default_factory=list)
    cfg_pruned_blocks: list[int] = field(default_factory=list)
    cfg_actual_blocks: list[int] = field(default_factory=list)
    cfg_pruned_ratio: float | None = None
    parallelism_config: ParallelismConfig | None = None
    quantize_config: QuantizeConfig | None = None


def summary(adapter_or_others: Any, details: bool = False, logging: bool = True, **_: Any) -> list[CacheStats]:
    """Statistics of the latest generation, one entry for each block list, in the order of the blocks.

    An object without a cache has one entry, which is empty apart from what was kept for the object.

    Args:
        adapter_or_others: a pipeline, a transformer, an adapter, or what `torch.compile` returned.
        details: print every step's decision too.
        logging: print the statistics as tables.
    """
    modules = [] if adapter_or_others is None else adapter_of(adapter_or_others).modules()
    if logging:
        for module in modules:
            _print(api.summary(module), details)
    return [entry for module in modules for entry in _entries_of(module)] or [CacheStats()]


def strify(adapter_or_others: Any) -> str:
    """A short name of settings and cached steps, for logs and files, such as "DBCache_F8B0_W8I1M0MC0_R0.08_T0O0_S12".

    Args:
        adapter_or_others: what `summary` takes or returns, one of its entries, or a dict that `load_configs` takes or
            returns. A pipeline and a transformer are named after their last block list, a list after its first entry.
    """
    if isinstance(adapter_or_others, dict):
        return _name_of(CacheStats(**_as_stats(adapter_or_others)))
    if isinstance(adapter_or_others, CacheStats):
        return _name_of(adapter_or_others)
    if isinstance(adapter_or_others, list):
        return _name_of(adapter_or_others[0]) if adapter_or_others else ""
    return _name_of(summary(adapter_or_others, logging=False)[-1])


def _print(stats: Sequence[OwnStats], details: bool) -> None:
    from rich import print as rich_print

    from cachedit_fx.report.stats import render

    if stats:
        rich_print(render(stats, details=details))


def _entries_of(module: torch.nn.Module) -> list[CacheStats]:
    """The module's entries: with settings alone if nothing has run; none if nothing was set."""
    kept = kept_of(module)
    others: dict[str, Any] = {"parallelism_config": kept.parallelism_config, "quantize_config": kept.quantize_config}
    state = next((state for state in states_of(module) if state.config is not None), None)
    if state is None:
        return [CacheStats(**others)] if any(others.values()) else []
    regions = api.summary(module)
    if not regions:
        return [CacheStats(cache_options=_cache_options(state.options, None), **others)]
    return [_entry(region, _cache_options(state.options, region.loop), others) for region in regions]


def _entry(region: OwnStats, cache_options: dict[str, Any], others: dict[str, Any]) -> CacheStats:
    first, second = region.branch(0), region.branch(1)
    return CacheStats(
        cache_options=cache_options,
        cached_steps=first.cached_steps,
        residual_diffs=_differences(first, region.prunes_blocks),
        cfg_cached_steps=second.cached_steps,
        cfg_residual_diffs=_differences(second, region.prunes_blocks),
        accumulated_cached_steps=len(first.cached_steps),
        cfg_accumulated_cached_steps=len(second.cached_steps),
        accumulated_executed_steps=first.executed_steps,
        accumulated_transformer_executed_steps=sum(branch.executed_steps for branch in region.branches),
        pruned_steps=region.pruned_steps,
        pruned_blocks=region.pruned_blocks,
        actual_blocks=region.actual_blocks,
        pruned_ratio=region.pruned_ratio,
        cfg_pruned_steps=region.cfg_pruned_steps,
        cfg_pruned_blocks=region.cfg_pruned_blocks,
        cfg_actual_blocks=region.cfg_actual_blocks,
        cfg_pruned_ratio=region.cfg_pruned_ratio,
        **others,
    )


def _differences(branch: BranchStats, prunes_blocks: bool) -> dict[str, Any]:
    """Step -> its difference; with DBPrune the differences of its blocks. Steps without a finite one are left out."""
    if not prunes_blocks:
        return {str(step): difference for step, difference in branch.residual_diffs.items()}
    steps = {
        str(step): [d.difference for d in blocks.values() if d.difference is not None and math.isfinite(d.difference)]
        for step, blocks in branch.parts.items()
    }
    return {step: differences for step, differences in steps.items() if differences}


def _cache_options(options: Options, loop: int | None) -> dict[str, Any]:
    settings = options.settings_of(loop)
    config = calibrator_config_of(settings.calibrator)
    calibrator = {} if config is None else {"calibrator_config": config}
    return {"cache_config": config_of(settings.policy.config)} | calibrator


def _as_stats(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of an entry with the settings of a dict."""
    is_loaded = isinstance(settings.get("cache_config"), BasicCacheConfig)
    configs = settings if is_loaded else load_configs(settings)
    names = ("parallelism_config", "quantize_config")
    cache = {name: configs.get(name) for name in ("cache_config", "calibrator_config") if configs.get(name) is not None}
    return {"cache_options": cache} | {name: configs.get(name) for name in names}


def _name_of(stats: CacheStats) -> str:
    config: BasicCacheConfig | None = stats.cache_options.get("cache_config")
    calibrator: CalibratorConfig | None = stats.cache_options.get("calibrator_config")
    parts: list[str] = []
    if config is not None and config.cache_type is not CacheType.NONE:
        parts.append(config.strify())
        if isinstance(config, DBPruneConfig) and stats.pruned_ratio is not None:
            parts.append(f"P{round(stats.pruned_ratio * 100, 2)}")
        parts.append("T0O0" if calibrator is None else calibrator.strify())
    parts += [other.strify() for other in (stats.parallelism_config, stats.quantize_config) if other is not None]
    if config is not None and stats.accumulated_cached_steps:
        parts.append(f"S{stats.accumulated_cached_steps}")
    return "_".join(parts)
