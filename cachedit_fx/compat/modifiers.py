"""Settings of single block lists, and settings in the flat style of older scripts and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import cachedit_fx
from cachedit_fx.compat.configs import CacheType, CalibratorConfig, DBCacheConfig, DBPruneConfig
from cachedit_fx.compat.masks import steps_mask
from cachedit_fx.compat.ours import check_ours
from cachedit_fx.compat.translation import (
    CALIBRATORS,
    AnyCacheConfig,
    AnyCalibratorConfig,
    changed_calibrator,
    changed_config,
    check_cache_config,
    check_calibrator_config,
    own_cache_config,
    settings_of,
)
from cachedit_fx.config.cache import DBCacheConfig as OwnCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig as OwnCalibratorConfig
from cachedit_fx.config.rules import FLAG, OptionError, check, optional, reject_unknown
from cachedit_fx.runtime.warning import SettingWarning, warn

OTHER_SECTIONS = ("parallelism_config", "attention_backend", "quantize_config")
"""What `load_configs` returns beside the configs of the cache."""

_FLAT_CALIBRATOR_NAMES = {
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "enable_encoder_foca": "enable_encoder_calibrator",
    "enable_encoder_dmd": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "calibrator_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
    "dmd_history": "dmd_history",
    "dmd_rank": "dmd_rank",
    "dmd_ridge": "dmd_ridge",
    "dmd_svd_precision": "dmd_svd_precision",
}
"""Name in flat settings -> field of a calibrator's config."""


class ParamsModifier:
    """Settings of one block list that differ from the shared ones.

    Args:
        cache_config: its fields that are not None replace the shared ones. Usually made by `DBCacheConfig().reset()`.
            A `DBPruneConfig` lets the list be pruned, whatever the shared config is.
        calibrator_config: its fields that are not None replace those of a shared one of the same class; one that is
            not enabled leaves the list without a calibrator.
        **fields: fields of the cache config, or `enable_taylorseer` and the like, in the style of older scripts.

    Raises:
        OptionError: on an unknown name, a value that is not allowed, or configs of another package.
    """

    def __init__(
        self,
        cache_config: AnyCacheConfig | None = None,
        calibrator_config: AnyCalibratorConfig | None = None,
        **fields: Any,
    ) -> None:
        check_cache_config(cache_config)
        check_calibrator_config(calibrator_config)
        values, calibrator = split_flat(without_others(fields, "ParamsModifier"), "compat.ParamsModifier")
        if values:
            empty = DBCacheConfig().reset()
            cache_config = _reset_config(empty if cache_config is None else cache_config, values)
        self.cache_config = cache_config
        self.calibrator_config = calibrator_config if calibrator is None else calibrator


def _reset_config(config: AnyCacheConfig, changes: Mapping[str, Any]) -> AnyCacheConfig:
    """The config with changes. Fields that were None stay None."""
    changed = changed_config(config, changes)
    if isinstance(changed, OwnCacheConfig) or isinstance(config, OwnCacheConfig):
        return changed
    return changed.reset(**config.settings() | dict(changes))


def own_modifier(
    modifier: Any, shared: OwnCacheConfig | None = None, calibrator: OwnCalibratorConfig | None = None
) -> cachedit_fx.ParamsModifier:
    """The modifier of `cachedit_fx` with these settings.

    Args:
        modifier: of either package.
        shared, calibrator: the configs that it modifies.

    Raises:
        OptionError: if it is no modifier of this package, or switches the cache off.
    """
    if isinstance(modifier, cachedit_fx.ParamsModifier):
        return modifier
    check_modifier(modifier)
    config = modifier.cache_config
    own_calibrator = changed_calibrator(modifier.calibrator_config, calibrator, config)
    kind = getattr(config, "cache_type", None)
    if kind is CacheType.NONE:
        raise OptionError(
            "params_modifiers: cache_type NONE switches no single block list off; name the other lists in "
            "BlockAdapter(blocks=...)"
        )
    if kind is CacheType.DBPrune and shared is not None and not isinstance(shared, cachedit_fx.DBPruneConfig):
        return cachedit_fx.ParamsModifier(own_cache_config(config, shared), own_calibrator)
    return cachedit_fx.ParamsModifier(calibrator_config=own_calibrator, **settings_of(config))


def check_modifier(modifier: Any) -> None:
    """Raise OptionError unless the argument is a modifier of this package."""
    if modifier is None:
        raise OptionError("params_modifiers: None is not allowed: it must be a ParamsModifier, which may be empty")
    check_ours("params_modifiers", modifier, "ParamsModifier", ParamsModifier, cachedit_fx.ParamsModifier)


def without_others(settings: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The settings without those that `load_configs` returns and `owner` has no use for. Says so if there are such."""
    for name in OTHER_SECTIONS:
        if settings.get(name) is not None:
            warn(f"{name} has no effect in {owner}: pass it to enable_cache", SettingWarning)
    return {name: value for name, value in settings.items() if name not in OTHER_SECTIONS}


def split_flat(
    settings: Mapping[str, Any], owner: str, more: Iterable[str] = ()
) -> tuple[dict[str, Any], CalibratorConfig | None]:
    """Divide flat settings into fields of a cache config, and the calibrator that they switch on.

    Args:
        settings: fields of a cache config and names such as `enable_taylorseer`, as older scripts and files have them.
            A mask may be a policy's name, if there is `num_inference_steps`.
        owner: where the names are from, for an error.
        more: further names that `owner` takes.

    Raises:
        OptionError: on an unknown name, a value that is not allowed, or more than one calibrator.
    """
    cache_fields = {each.name for config in (DBCacheConfig, DBPruneConfig) for each in fields(config)}
    switches = {f"enable_{kind}": config_class for kind, config_class in CALIBRATORS.items()}
    reject_unknown(settings, dict.fromkeys(sorted({*cache_fields, *switches, *_FLAT_CALIBRATOR_NAMES, *more}), owner))
    for name in switches:
        check(name, settings.get(name), optional(FLAG))
    flags = [name for name in switches if settings.get(name)]
    if len(flags) > 1:
        raise OptionError(f"{' and '.join(flags)} are mutually exclusive: set one of them to true")
    calibrator = None
    if flags:
        config_class = switches[flags[0]]
        owned = {each.name for each in fields(config_class)}
        values = {_FLAT_CALIBRATOR_NAMES.get(name, ""): value for name, value in settings.items()}
        calibrator = config_class().update(**{name: value for name, value in values.items() if name in owned})
    return _with_mask({name: value for name, value in settings.items() if name in cache_fields}), calibrator


def _with_mask(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a mask in the place of a policy's name, or of a number that a YAML file has without quotes."""
    mask, steps = values.get("steps_computation_mask"), values.get("num_inference_steps")
    if isinstance(mask, int) and not isinstance(mask, bool):
        return values | {"steps_computation_mask": str(mask)}
    if not isinstance(mask, str) or mask.isdecimal():
        return values
    if steps is None:
        raise OptionError(f"steps_computation_mask={mask!r} names a mask: give num_inference_steps too")
    return values | {"steps_computation_mask": steps_mask(total_steps=steps, mask_policy=mask)}
