"""Translates the mutable configs into the frozen ones of `cachedit_fx`, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import cachedit_fx
from cachedit_fx.compat.configs import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    TaylorSeerCalibratorConfig,
    new_config,
    plain,
)
from cachedit_fx.compat.ours import check_ours
from cachedit_fx.config.cache import DBCacheConfig as OwnCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig as OwnCalibratorConfig
from cachedit_fx.config.calibrators import TaylorSeerCalibratorConfig as OwnTaylorSeerConfig
from cachedit_fx.config.rules import is_number

AnyCacheConfig: TypeAlias = BasicCacheConfig | OwnCacheConfig
AnyCalibratorConfig: TypeAlias = CalibratorConfig | OwnCalibratorConfig

CALIBRATORS: dict[str, type[CalibratorConfig]] = {
    "taylorseer": TaylorSeerCalibratorConfig,
    "foca": FoCaCalibratorConfig,
    "dmd": DMDCalibratorConfig,
}
"""`calibrator_type` -> config. Flat settings have a flag `enable_...` for each."""

ALWAYS = 1.0
"""A threshold from which on cache-dit compares nothing and reuses."""

NO_CALIBRATOR = OwnTaylorSeerConfig(taylorseer_order=0)
"""Repeats the latest value, as no calibrator does. Stands in the place of a shared calibrator that is switched off."""


def check_cache_config(config: Any) -> None:
    """Raise OptionError unless the argument is None, or a cache config of this package."""
    check_ours("cache_config", config, "DBCacheConfig or DBPruneConfig", BasicCacheConfig, OwnCacheConfig)


def check_calibrator_config(config: Any) -> None:
    """Raise OptionError unless the argument is None, or a calibrator's config of this package."""
    title = "TaylorSeerCalibratorConfig or the like"
    check_ours("calibrator_config", config, title, CalibratorConfig, OwnCalibratorConfig)


def settings_of(config: AnyCacheConfig | None) -> dict[str, Any]:
    """The fields of a cache config that are not None, by name; empty for None.

    Raises:
        OptionError: if it is no cache config of this package.
    """
    check_cache_config(config)
    if isinstance(config, BasicCacheConfig):
        names = {each.name for each in fields(_own_class(config))}
        return {name: value for name, value in own_values(config.settings()).items() if name in names}
    return {} if config is None else {each.name: getattr(config, each.name) for each in fields(config)}


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields in the form that `cachedit_fx` takes. A threshold of 1 or more means: always reuse."""
    own = {name: plain(value) for name, value in values.items()}
    threshold: Any = own.get("residual_diff_threshold")
    is_always = is_number(threshold) and threshold >= ALWAYS
    return own | ({"residual_diff_threshold": math.inf} if is_always else {})


def own_cache_config(config: AnyCacheConfig | None, shared: OwnCacheConfig | None = None) -> OwnCacheConfig | None:
    """The config of `cachedit_fx` with these settings; None if the config is None or switches the cache off.

    Args:
        config: of either package.
        shared: has the fields that are None in `config`. Without it they have their defaults.
    """
    settings = settings_of(config)
    if config is None or isinstance(config, OwnCacheConfig):
        return config
    if config.cache_type is CacheType.NONE:
        return None
    own_class = _own_class(config)
    names = {each.name for each in fields(own_class)}
    rest = {} if shared is None else {each.name: getattr(shared, each.name) for each in fields(shared)}
    return own_class(**{name: value for name, value in rest.items() if name in names} | settings)


def changed_config(config: AnyCacheConfig | None, changes: Mapping[str, Any]) -> AnyCacheConfig:
    """A config with some fields changed, of the kind that `changes` name; the argument stays as it is."""
    if isinstance(config, OwnCacheConfig):
        return config.reset(**own_values(changes))
    settings = ({} if config is None else config.settings()) | dict(changes)
    return new_config(settings.get("cache_type", CacheType.DBCache)).update(**settings)


def own_calibrator_config(
    config: AnyCalibratorConfig | None, cache_config: AnyCacheConfig | None = None
) -> OwnCalibratorConfig | None:
    """The calibrator's config of `cachedit_fx`; None if the config is None or not enabled.

    Raises:
        OptionError: if it is no calibrator's config of this package.
    """
    check_calibrator_config(config)
    if config is None or isinstance(config, OwnCalibratorConfig):
        return config
    is_enabled = config.enable_calibrator
    if not (type(config)().enable_calibrator if is_enabled is None else is_enabled):
        return None
    own_class: Any = getattr(cachedit_fx, CALIBRATORS[config.calibrator_type].own)
    names = {each.name for each in fields(own_class)}
    values = {name: value for name, value in config.settings().items() if name in names}
    if isinstance(cache_config, DBPruneConfig) and cache_config.force_reduce_calibrator_vram:
        values["calibrator_state_dtype"] = "model"
    own: OwnCalibratorConfig = own_class(**values)
    return own


def changed_calibrator(
    config: AnyCalibratorConfig | None,
    shared: OwnCalibratorConfig | None,
    cache_config: AnyCacheConfig | None = None,
) -> OwnCalibratorConfig | None:
    """The calibrator in place of a shared one; None if the config is None, which leaves the shared one.

    Fields that are None are those of the shared one, if it is of the same class.
    """
    base = calibrator_config_of(shared)
    if isinstance(config, CalibratorConfig) and type(base) is type(config):
        config = base.update(**config.settings())
    own = own_calibrator_config(config, cache_config)
    return own if own is not None or config is None else NO_CALIBRATOR


def config_of(own: OwnCacheConfig) -> BasicCacheConfig:
    """The mutable config with the settings of a config of `cachedit_fx`."""
    config_class = DBPruneConfig if isinstance(own, cachedit_fx.DBPruneConfig) else DBCacheConfig
    names = {each.name for each in fields(config_class)} & {each.name for each in fields(own)}
    settings = {name: getattr(own, name) for name in names}
    settings["residual_diff_threshold"] = min(own.residual_diff_threshold, ALWAYS)
    return config_class(**settings)


def calibrator_config_of(own: OwnCalibratorConfig | None) -> CalibratorConfig | None:
    """The mutable config with the settings of a calibrator's config of `cachedit_fx`; None if cache-dit has no such."""
    config_class = {each.own: each for each in CALIBRATORS.values()}.get(type(own).__name__)
    if own is None or config_class is None:
        return None
    names = {each.name for each in fields(config_class)} & {each.name for each in fields(own)}
    return config_class(**{name: getattr(own, name) for name in names})


def _own_class(config: BasicCacheConfig) -> type[OwnCacheConfig]:
    return cachedit_fx.DBPruneConfig if config.cache_type is CacheType.DBPrune else OwnCacheConfig
