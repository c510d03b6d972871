"""A torch.compile backend that lets diffusion transformers skip the work that consecutive denoising steps repeat.

Importing the package imports no other package, not even torch. A public name is imported from its module at its first
use.
"""

from __future__ import annotations

import sys as _sys
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from cachedit_fx.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from cachedit_fx.api import compile, disable_cache, enable_cache, end_session, refresh_context, summary
    from cachedit_fx.config.attention import AttentionConfig
    from cachedit_fx.config.cache import DBCacheConfig
    from cachedit_fx.config.calibrators import (
        CalibratorConfig,
        DMDCalibratorConfig,
        FoCaCalibratorConfig,
        LagrangeCalibratorConfig,
        TaylorSeerCalibratorConfig,
    )
    from cachedit_fx.config.options import Options, ParamsModifier
    from cachedit_fx.config.precision import PrecisionConfig
    from cachedit_fx.config.rules import OptionError
    from cachedit_fx.config.steps import StepFacts
    from cachedit_fx.explanation import Explanation, explain
    from cachedit_fx.quantization.apply import dequantize, quantize
    from cachedit_fx.quantization.files import load_quantized, save_quantized
    from cachedit_fx.quantization.report import QuantizationReport
    from cachedit_fx.runtime.policies.base import Action, Decision, Reason
    from cachedit_fx.runtime.policies.dbprune import DBPruneConfig
    from cachedit_fx.runtime.presence import RankMissing, RanksDisagree
    from cachedit_fx.runtime.session import session
    from cachedit_fx.runtime.stats import BranchStats, CacheStats
    from cachedit_fx.runtime.verification import VerificationError
    from cachedit_fx.runtime.warning import CacheWarning
    from cachedit_fx.schedules.masks import steps_mask
    from cachedit_fx.schedules.presets import presets

_MODULES = {
    "api": ("compile", "disable_cache", "enable_cache", "end_session", "refresh_context", "summary"),
    "config.attention": ("AttentionConfig",),
    "config.cache": ("DBCacheConfig",),
    "config.calibrators": (
        "CalibratorConfig",
        "DMDCalibratorConfig",
        "FoCaCalibratorConfig",
        "LagrangeCalibratorConfig",
        "TaylorSeerCalibratorConfig",
    ),
    "config.options": ("Options", "ParamsModifier"),
    "config.precision": ("PrecisionConfig",),
    "config.rules": ("OptionError",),
    "config.steps": ("StepFacts",),
    "explanation": ("Explanation", "explain"),
    "quantization.apply": ("dequantize", "quantize"),
    "quantization.files": ("load_quantized", "save_quantized"),
    "quantization.report": ("QuantizationReport",),
    "runtime.policies.base": ("Action", "Decision", "Reason"),
    "runtime.policies.dbprune": ("DBPruneConfig",),
    "runtime.presence": ("RankMissing", "RanksDisagree"),
    "runtime.session": ("session",),
    "runtime.stats": ("BranchStats", "CacheStats"),
    "runtime.verification": ("VerificationError",),
    "runtime.warning": ("CacheWarning",),
    "schedules.masks": ("steps_mask",),
    "schedules.presets": ("presets",),
}
"""Module -> the public names that it defines."""

__all__ = [
    "Action",
    "AttentionConfig",
    "BranchStats",
    "CacheStats",
    "CacheWarning",
    "CalibratorConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "Decision",
    "Explanation",
    "FoCaCalibratorConfig",
    "LagrangeCalibratorConfig",
    "OptionError",
    "Options",
    "ParamsModifier",
    "PrecisionConfig",
    "QuantizationReport",
    "RankMissing",
    "RanksDisagree",
    "Reason",
    "StepFacts",
    "TaylorSeerCalibratorConfig",
    "VerificationError",
    "compile",
    "dequantize",
    "disable_cache",
    "enable_cache",
    "end_session",
    "explain",
    "load_quantized",
    "presets",
    "quantize",
    "refresh_context",
    "save_quantized",
    "session",
    "steps_mask",
    "summary",
]


def _find_sources_of_checkout() -> None:
    """Make `cachedit_fx.kernels` and `cachedit_fx.passes` importable in a checkout. Both lie next to this folder there.

    A wheel holds both inside the package and needs nothing. In a checkout they have no `__init__.py`: transformers,
    among others, would take a top-level `kernels` package for the one on PyPI. So neither an editable install's finder
    nor a start in the checkout's root would find them.

    The root must not go on this package's path. Then the package would hold itself, and whoever walks it would not
    come to an end: torch does at its import, with `TORCH_LOGS="+cachedit_fx"`.
    """
    root = _Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return
    for name in ("kernels", "passes"):
        spec = _ModuleSpec(f"{__name__}.{name}", None, is_package=True)
        if (root / name).is_dir() and spec.name not in _sys.modules:
            spec.submodule_search_locations = [str(root / name)]
            _sys.modules[spec.name] = globals()[name] = _module_from_spec(spec)


_find_sources_of_checkout()

__getattr__, __dir__ = _lazy_names(globals(), _MODULES)
