"""A torch.compile backend that lets diffusion transformers skip the work that consecutive denoising steps repeat."""

from pathlib import Path as _Path


def _find_sources_of_checkout() -> None:
    """Make `cachedit_fx.kernels` and `cachedit_fx.passes` importable in a checkout, where both lie beside this folder.

    A wheel holds them inside the package and needs nothing. In a checkout they have no `__init__.py` (a top-level
    `kernels` package would be taken for the one on PyPI, by transformers among others), so neither an editable
    install's finder nor a start in the checkout's root would find them; with the root on this package's path both do.
    """
    root = _Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file() and (root / "passes").is_dir() and str(root) not in __path__:
        __path__.append(str(root))


_find_sources_of_checkout()

from cachedit_fx.api import compile, disable_cache, enable_cache, refresh_context, summary
from cachedit_fx.config.cache import DBCacheConfig, DBPruneConfig
from cachedit_fx.config.calibrators import (
    CalibratorConfig,
    FoCaCalibratorConfig,
    LagrangeCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from cachedit_fx.config.options import Options, ParamsModifier
from cachedit_fx.config.rules import OptionError
from cachedit_fx.explanation import Explanation, explain
from cachedit_fx.runtime.policies.base import Action, Decision, Reason
from cachedit_fx.runtime.session import session
from cachedit_fx.runtime.stats import BranchStats, CacheStats
from cachedit_fx.runtime.warning import CacheWarning
from cachedit_fx.schedules.masks import steps_mask
from cachedit_fx.schedules.presets import presets

__all__ = [
    "Action",
    "BranchStats",
    "CacheStats",
    "CacheWarning",
    "CalibratorConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "Decision",
    "Explanation",
    "FoCaCalibratorConfig",
    "LagrangeCalibratorConfig",
    "OptionError",
    "Options",
    "ParamsModifier",
    "Reason",
    "TaylorSeerCalibratorConfig",
    "compile",
    "disable_cache",
    "enable_cache",
    "explain",
    "presets",
    "refresh_context",
    "session",
    "steps_mask",
    "summary",
]
