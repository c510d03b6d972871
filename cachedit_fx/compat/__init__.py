"""cache-dit's public names on this package's backend: `import cachedit_fx.compat as cache_dit`.

The names translate settings into those of `cachedit_fx`. Nothing is patched. docs/coming-from-cache-dit.md lists every
name with its status and the differences. Importing the package imports nothing but `cachedit_fx`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachedit_fx.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from cachedit_fx.compat.absent import (
        LayerwiseOffloadHandle,
        LayerwiseOffloadHandleGroup,
        ProfilerContext,
        create_profiler_context,
        get_layerwise_offload_handles,
        get_profiler_output_dir,
        layerwise_cpu_offload,
        layerwise_offload,
        profile_function,
        remove_layerwise_offload,
        set_profiler_output_dir,
    )
    from cachedit_fx.compat.adapters import (
        BlockAdapter,
        BlockAdapterRegister,
        get_adapter,
        supported_matrix,
        supported_pipelines,
    )
    from cachedit_fx.compat.calibrators import FoCaCalibrator, TaylorSeerCalibrator
    from cachedit_fx.compat.configs import (
        BasicCacheConfig,
        CacheType,
        CalibratorConfig,
        DBCacheConfig,
        DBPruneConfig,
        DMDCalibratorConfig,
        FoCaCalibratorConfig,
        TaylorSeerCalibratorConfig,
        block_range,
        cache_type,
    )
    from cachedit_fx.compat.interface import disable_cache, enable_cache, refresh_context, set_attn_backend
    from cachedit_fx.compat.loaders import (
        load_attn_backend_config,
        load_cache_config,
        load_configs,
        load_options,
        load_parallelism_config,
        load_quantize_config,
    )
    from cachedit_fx.compat.masks import steps_mask
    from cachedit_fx.compat.modifiers import ParamsModifier
    from cachedit_fx.compat.parallelism import (
        ParallelismBackend,
        ParallelismConfig,
        set_compile_configs,
    )
    from cachedit_fx.compat.patterns import ForwardPattern, PatchFunctor
    from cachedit_fx.compat.quantization import QuantizeBackend, QuantizeConfig, load, quantize
    from cachedit_fx.compat.statistics import CacheStats, strify, summary

    NONE, DBCache, DBPrune = CacheType.NONE, CacheType.DBCache, CacheType.DBPrune
    Pattern_0, Pattern_1, Pattern_2 = ForwardPattern.Pattern_0, ForwardPattern.Pattern_1, ForwardPattern.Pattern_2
    Pattern_3, Pattern_4, Pattern_5 = ForwardPattern.Pattern_3, ForwardPattern.Pattern_4, ForwardPattern.Pattern_5

_MODULES = {
    "absent": (
        "LayerwiseOffloadHandle",
        "LayerwiseOffloadHandleGroup",
        "ProfilerContext",
        "create_profiler_context",
        "get_layerwise_offload_handles",
        "get_profiler_output_dir",
        "layerwise_cpu_offload",
        "layerwise_offload",
        "profile_function",
        "remove_layerwise_offload",
        "set_profiler_output_dir",
    ),
    "adapters": ("BlockAdapter", "BlockAdapterRegister", "get_adapter", "supported_matrix", "supported_pipelines"),
    "calibrators": ("FoCaCalibrator", "TaylorSeerCalibrator"),
    "configs": (
        "BasicCacheConfig",
        "CacheType",
        "CalibratorConfig",
        "DBCache",
        "DBCacheConfig",
        "DBPrune",
        "DBPruneConfig",
        "DMDCalibratorConfig",
        "FoCaCalibratorConfig",
        "NONE",
        "TaylorSeerCalibratorConfig",
        "block_range",
        "cache_type",
    ),
    "interface": ("disable_cache", "enable_cache", "refresh_context", "set_attn_backend"),
    "loaders": (
        "load_attn_backend_config",
        "load_cache_config",
        "load_configs",
        "load_options",
        "load_parallelism_config",
        "load_quantize_config",
    ),
    "masks": ("steps_mask",),
    "modifiers": ("ParamsModifier",),
    "parallelism": ("ParallelismBackend", "ParallelismConfig", "set_compile_configs"),
    "patterns": (
        "ForwardPattern",
        "PatchFunctor",
        "Pattern_0",
        "Pattern_1",
        "Pattern_2",
        "Pattern_3",
        "Pattern_4",
        "Pattern_5",
    ),
    "quantization": ("QuantizeBackend", "QuantizeConfig", "load", "quantize"),
    "statistics": ("CacheStats", "strify", "summary"),
}
"""Module -> the public names that it defines."""

__all__ = [
    "BasicCacheConfig",
    "BlockAdapter",
    "BlockAdapterRegister",
    "CacheStats",
    "CacheType",
    "CalibratorConfig",
    "DBCache",
    "DBCacheConfig",
    "DBPrune",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "FoCaCalibrator",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "LayerwiseOffloadHandle",
    "LayerwiseOffloadHandleGroup",
    "NONE",
    "ParallelismBackend",
    "ParallelismConfig",
    "ParamsModifier",
    "PatchFunctor",
    "Pattern_0",
    "Pattern_1",
    "Pattern_2",
    "Pattern_3",
    "Pattern_4",
    "Pattern_5",
    "ProfilerContext",
    "QuantizeBackend",
    "QuantizeConfig",
    "TaylorSeerCalibrator",
    "TaylorSeerCalibratorConfig",
    "block_range",
    "cache_type",
    "create_profiler_context",
    "disable_cache",
    "enable_cache",
    "get_adapter",
    "get_layerwise_offload_handles",
    "get_profiler_output_dir",
    "layerwise_cpu_offload",
    "layerwise_offload",
    "load",
    "load_attn_backend_config",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "load_quantize_config",
    "profile_function",
    "quantize",
    "refresh_context",
    "remove_layerwise_offload",
    "set_attn_backend",
    "set_compile_configs",
    "set_profiler_output_dir",
    "steps_mask",
    "strify",
    "summary",
    "supported_matrix",
    "supported_pipelines",
]

__getattr__, __dir__ = _lazy_names(globals(), _MODULES)
