"""Mutable configs with cache-dit's names, and their translation into the frozen configs of `cachedit_fx`.

    DBCacheConfig(max_warmup_steps=4)          all fields set: a whole config
    DBCacheConfig().reset(max_warmup_steps=4)  the other fields are None: changes of a shared config

A field that is None is left to the shared config, or to the default. Values are checked when they are set by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Self, TypeAlias

import cachedit_fx
from cachedit_fx.config.cache import DBCacheConfig as OwnCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig as OwnCalibratorConfig
from cachedit_fx.config.rules import OptionError, check, choice, is_number, reject_unknown


class CacheType(Enum):
    """The kind of a cache config."""

    NONE = "NONE"
    DBCache = "DBCache"
    DBPrune = "DBPrune"

    @staticmethod
    def type(hint: CacheType | str | None) -> CacheType:
        """`cache_type(hint)`."""
        return cache_type(hint)

    def __str__(self) -> str:
        return self.value


NONE, DBCache, DBPrune = CacheType

_ALIASES = {
    CacheType.DBCache: {"DUAL_BLOCK_CACHE", "DB_CACHE", "DBCACHE", "DB"},
    CacheType.DBPrune: {"DYNAMIC_BLOCK_PRUNE", "DB_PRUNE", "DBPRUNE", "DBP"},
    CacheType.NONE: {"NONE", "NO_CACHE", "NOCACHE", "NC"},
}


def cache_type(hint: CacheType | str | None) -> CacheType:
    """The cache type of a name in any case, such as "DBCache" or "db_prune". None is `CacheType.NONE`.

    Raises:
        OptionError: on an unknown name.
    """
    if hint is None or isinstance(hint, CacheType):
        return hint or CacheType.NONE
    for kind, names in _ALIASES.items():
        if str(hint).upper() in names:
            return kind
    raise OptionError(f"cache_type={hint!r} is not allowed: it must be one of {', '.join(map(str, CacheType))}")


def block_range(start: int, end: int, step: int = 1) -> list[int]:
    """Every `step`-th block number from `start` on, with 0 and `end` - 1 added; empty if `step` is 1."""
    return sorted({0, *range(start, end, step), end - 1}) if end > 0 and start <= end and step > 1 else []


@dataclass
class _Mutable:
    """A config whose fields may be None, and change."""

    own: ClassVar[str]
    """Name of the config of `cachedit_fx` that has rules for the fields."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Fields that `reset` leaves as they are."""

    def __post_init__(self) -> None:
        for name, value in self._checked({each.name: getattr(self, each.name) for each in fields(self)}).items():
            setattr(self, name, value)

    def update(self, **values: Any) -> Self:
        """Set those of `values` that are not None, and return this config.

        Raises:
            OptionError: on an unknown name, or a value that is not allowed.
        """
        reject_unknown(values, dict.fromkeys((each.name for each in fields(self)), f"compat.{type(self).__name__}"))
        for name, value in self._checked(values).items():
            if value is not None:
                setattr(self, name, value)
        return self

    def empty(self, **values: Any) -> Self:
        """Set every field to None, then `update`. For `ParamsModifier`: only `values` differ from the shared config."""
        for each in fields(self):
            if each.name not in self.kept:
                setattr(self, each.name, None)
        return self.update(**values)

    def reset(self, **values: Any) -> Self:
        """Another name of `empty`."""
        return self.empty(**values)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)

    def settings(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def _checked(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values, checked by the rules of `cachedit_fx` that there are."""
        own_fields = getattr(getattr(cachedit_fx, self.own, None), "__dataclass_fields__", {})
        for name, value in values.items():
            if value is not None and name in own_fields:
                check(name, _plain(value), own_fields[name].metadata["rule"])
        return values


@dataclass
class BasicCacheConfig(_Mutable):
    """When the blocks in the middle are bypassed: the fields of `cachedit_fx.DBCacheConfig`, and `cache_type`."""

    own: ClassVar[str] = "DBCacheConfig"
    kept: ClassVar[tuple[str, ...]] = ("cache_type",)

    cache_type: CacheType = CacheType.DBCache
    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = None
    steps_computation_mask: Sequence[int] | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"

    def strify(self) -> str:
        """A short name for logs and files, such as "DBCache_F8B0_W8I1M0MC0_R0.08"."""
        mask, steps, refresh = self.steps_computation_mask, self.num_inference_steps, self.force_refresh_step_hint
        parts = [_cut_and_limits(self)]
        if mask is not None:
            parts += [f"SCM{''.join(map(str, mask))}", str(self.steps_computation_policy)]
        if steps is not None:
            parts.append(f"N{steps}")
        if refresh is not None:
            parts += [f"FR{refresh}", str(self.force_refresh_step_policy)]
        if self.enable_separate_cfg is not None:
            parts.append(f"CFG{int(self.enable_separate_cfg)}")
        return "_".join(parts)

    def _checked(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if values.get("cache_type") is not None:
            values = {**values, "cache_type": cache_type(values["cache_type"])}
        return super()._checked(values)


def _cut_and_limits(config: BasicCacheConfig) -> str:
    cached, run = (max(0, limit or 0) for limit in (config.max_cached_steps, config.max_continuous_cached_steps))
    return (
        f"{config.cache_type}_F{config.Fn_compute_blocks}B{config.Bn_compute_blocks}_W{config.max_warmup_steps}"
        f"I{config.warmup_interval}M{cached}MC{run}_R{config.residual_diff_threshold}"
    )


@dataclass
class DBCacheConfig(BasicCacheConfig):
    """DBCache: the middle is bypassed as a whole."""


@dataclass
class DBPruneConfig(BasicCacheConfig):
    """DBPrune: every block of the middle is bypassed separately."""

    own: ClassVar[str] = "DBPruneConfig"

    cache_type: CacheType = CacheType.DBPrune
    enable_dynamic_prune_threshold: bool = False
    max_dynamic_prune_threshold: float | None = None
    dynamic_prune_threshold_relax_ratio: float = 1.25
    non_prune_block_ids: Sequence[int] = field(default_factory=list)
    force_reduce_calibrator_vram: bool = False
    """Store the calibrator's values in the model's dtype: `calibrator_state_dtype="model"`."""

    def strify(self) -> str:
        """A short name for logs and files, such as "DBPrune_F8B0_W8I1M0MC0_R0.08"."""
        return _cut_and_limits(self)


def new_config(kind: CacheType | str | None = CacheType.DBCache) -> BasicCacheConfig:
    """A config of that cache type, with its defaults."""
    kind = cache_type(kind)
    return DBPruneConfig() if kind is CacheType.DBPrune else DBCacheConfig(cache_type=kind)


@dataclass
class CalibratorConfig(_Mutable):
    """How a bypassed region's results are predicted; the base of the calibrators' own configs."""

    own: ClassVar[str] = "CalibratorConfig"
    kept: ClassVar[tuple[str, ...]] = ("calibrator_type",)

    enable_calibrator: bool = False
    enable_encoder_calibrator: bool = False
    """Has no effect: all streams of a region are predicted, or none."""
    calibrator_type: str = "taylorseer"
    calibrator_cache_type: str = "residual"
    calibrator_kwargs: dict[str, Any] = field(default_factory=dict)
    """Has no effect: a calibrator's settings are its fields."""

    def strify(self, details: bool = False) -> str:
        """A short name for logs and files, with `details` a longer one."""
        return "CalibratorBase"

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments of the calibrator's class."""
        return dict(self.calibrator_kwargs or {})


@dataclass
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """A Taylor expansion over the computed steps."""

    own: ClassVar[str] = "TaylorSeerCalibratorConfig"

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    taylorseer_order: int = 1

    def strify(self, details: bool = False) -> str:
        """ "T1O2" for order 2, "TaylorSeer_O(2)" with `details`."""
        if not self.taylorseer_order:
            return "NONE"
        return f"TaylorSeer_O({self.taylorseer_order})" if details else f"T1O{self.taylorseer_order}"

    def to_kwargs(self) -> dict[str, Any]:
        return super().to_kwargs() | {"n_derivatives": self.taylorseer_order}


@dataclass
class FoCaCalibratorConfig(CalibratorConfig):
    """Forecast, then calibrate."""

    own: ClassVar[str] = "FoCaCalibratorConfig"

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "foca"

    def strify(self, details: bool = False) -> str:
        """ "FoCa"."""
        return "FoCa"


@dataclass
class DMDCalibratorConfig(CalibratorConfig):
    """Dynamic mode decomposition of the latest computed steps."""

    own: ClassVar[str] = "DMDCalibratorConfig"

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "dmd"
    dmd_history: int = 6
    dmd_rank: int = 0
    dmd_ridge: float = 1e-8
    dmd_svd_precision: str = "medium"

    def strify(self, details: bool = False) -> str:
        """ "DMDH6" for six steps, "DMD_H(6, medium)" with `details`."""
        precision = self.dmd_svd_precision or "medium"
        if details:
            return f"DMD_H({self.dmd_history}, {precision})"
        return f"DMDH{self.dmd_history}{'' if precision == 'medium' else precision[0]}"

    def to_kwargs(self) -> dict[str, Any]:
        names = {"history": self.dmd_history, "rank": self.dmd_rank, "ridge": self.dmd_ridge}
        return super().to_kwargs() | names | {"svd_precision": self.dmd_svd_precision}


class ParamsModifier:
    """Settings of one block list that differ from the shared ones.

    Args:
        cache_config: its fields that are not None replace the shared ones. Usually made by `DBCacheConfig().reset()`.
        calibrator_config: in place of the shared one.
        **fields: fields of the cache config, or `enable_taylorseer` and the like, in the style of older scripts.
    """

    def __init__(
        self,
        cache_config: BasicCacheConfig | None = None,
        calibrator_config: CalibratorConfig | None = None,
        **fields: Any,
    ) -> None:
        values, calibrator = split_flat(fields, "compat.ParamsModifier")
        if values:
            config_class = DBCacheConfig if cache_config is None else type(cache_config)
            cache_config = config_class().reset(**settings_of(cache_config) | values)
        self.cache_config = cache_config
        self.calibrator_config = calibrator_config if calibrator is None else calibrator


AnyCacheConfig: TypeAlias = BasicCacheConfig | OwnCacheConfig
AnyCalibratorConfig: TypeAlias = CalibratorConfig | OwnCalibratorConfig

_CALIBRATORS: dict[str, type[CalibratorConfig]] = {
    "taylorseer": TaylorSeerCalibratorConfig,
    "foca": FoCaCalibratorConfig,
    "dmd": DMDCalibratorConfig,
}
"""`calibrator_type` -> config. Flat settings have a flag `enable_...` for each."""

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


def split_flat(
    settings: Mapping[str, Any], owner: str, more: Iterable[str] = ()
) -> tuple[dict[str, Any], CalibratorConfig | None]:
    """Divide flat settings into fields of a cache config, and the calibrator that they switch on.

    Args:
        settings: fields of a cache config and names such as `enable_taylorseer`, as older scripts and files have them.
        owner: where the names are from, for an error.
        more: further names that `owner` takes.

    Raises:
        OptionError: on an unknown name, or more than one calibrator.
    """
    cache_fields = {each.name for config in (DBCacheConfig, DBPruneConfig) for each in fields(config)}
    switches = {f"enable_{kind}": config_class for kind, config_class in _CALIBRATORS.items()}
    reject_unknown(settings, dict.fromkeys(sorted({*cache_fields, *switches, *_FLAT_CALIBRATOR_NAMES, *more}), owner))
    flags = [name for name in switches if settings.get(name)]
    if len(flags) > 1:
        raise OptionError(f"{' and '.join(flags)} are mutually exclusive: set one of them to true")
    calibrator = None
    if flags:
        config_class = switches[flags[0]]
        owned = {each.name for each in fields(config_class)}
        values = {_FLAT_CALIBRATOR_NAMES.get(name, ""): value for name, value in settings.items()}
        calibrator = config_class().update(**{name: value for name, value in values.items() if name in owned})
    return {name: value for name, value in settings.items() if name in cache_fields}, calibrator


# ---------------------------------------------------------------------------------------------------------------------
# Translation

ALWAYS = 1.0
"""A threshold from which on cache-dit compares nothing and reuses."""


def settings_of(config: AnyCacheConfig | None) -> dict[str, Any]:
    """The fields of a cache config that are not None, by name; empty for None.

    Raises:
        OptionError: if it is no cache config of this package.
    """
    if config is None:
        return {}
    if isinstance(config, BasicCacheConfig):
        names = {each.name for each in fields(_own_class(config))}
        return {name: value for name, value in own_values(config.settings()).items() if name in names}
    if isinstance(config, OwnCacheConfig):
        return {each.name: getattr(config, each.name) for each in fields(config)}
    raise OptionError(_not_ours("cache_config", config, "DBCacheConfig or DBPruneConfig"))


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields in the form that `cachedit_fx` takes. A threshold of 1 or more means: always reuse."""
    plain = {name: _plain(value) for name, value in values.items()}
    threshold: Any = plain.get("residual_diff_threshold")
    is_always = is_number(threshold) and threshold >= ALWAYS
    return plain | ({"residual_diff_threshold": math.inf} if is_always else {})


def own_cache_config(config: AnyCacheConfig | None) -> OwnCacheConfig | None:
    """The config of `cachedit_fx` with these settings; None if the config is None or switches the cache off."""
    if isinstance(config, OwnCacheConfig):
        return config
    settings = settings_of(config)
    if config is None or config.cache_type is CacheType.NONE:
        return None
    return _own_class(config)(**settings)


def own_calibrator_config(
    config: AnyCalibratorConfig | None, cache_config: AnyCacheConfig | None = None
) -> OwnCalibratorConfig | None:
    """The calibrator's config of `cachedit_fx`; None if the config is None or not enabled.

    Raises:
        OptionError: if it is no calibrator's config of this package.
    """
    if config is None or isinstance(config, OwnCalibratorConfig):
        return config
    if not isinstance(config, CalibratorConfig):
        raise OptionError(_not_ours("calibrator_config", config, "TaylorSeerCalibratorConfig and the like"))
    if not config.enable_calibrator and not config.enable_encoder_calibrator:
        return None
    check("calibrator_type", config.calibrator_type, choice(*_CALIBRATORS))
    own_class: Any = getattr(cachedit_fx, _CALIBRATORS[config.calibrator_type].own)
    names = {each.name for each in fields(own_class)}
    values = {name: value for name, value in config.settings().items() if name in names}
    if isinstance(cache_config, DBPruneConfig) and cache_config.force_reduce_calibrator_vram:
        values["calibrator_state_dtype"] = "model"
    own: OwnCalibratorConfig = own_class(**values)
    return own


def own_modifier(modifier: Any) -> cachedit_fx.ParamsModifier:
    """The modifier of `cachedit_fx` with these settings.

    Raises:
        OptionError: if it is no modifier of this package.
    """
    if isinstance(modifier, cachedit_fx.ParamsModifier):
        return modifier
    if not isinstance(modifier, ParamsModifier):
        raise OptionError(_not_ours("params_modifiers", modifier, "ParamsModifier"))
    calibrator = own_calibrator_config(modifier.calibrator_config, modifier.cache_config)
    return cachedit_fx.ParamsModifier(calibrator_config=calibrator, **settings_of(modifier.cache_config))


def config_of(own: OwnCacheConfig) -> BasicCacheConfig:
    """The mutable config with the settings of a config of `cachedit_fx`."""
    config_class = DBPruneConfig if isinstance(own, cachedit_fx.DBPruneConfig) else DBCacheConfig
    names = {each.name for each in fields(config_class)} & {each.name for each in fields(own)}
    settings = {name: getattr(own, name) for name in names}
    settings["residual_diff_threshold"] = min(own.residual_diff_threshold, ALWAYS)
    return config_class(**settings)


def calibrator_config_of(own: OwnCalibratorConfig | None) -> CalibratorConfig | None:
    """The mutable config with the settings of a calibrator's config of `cachedit_fx`; None if cache-dit has no such."""
    config_class = {each.own: each for each in _CALIBRATORS.values()}.get(type(own).__name__)
    if own is None or config_class is None:
        return None
    names = {each.name for each in fields(config_class)} & {each.name for each in fields(own)}
    return config_class(**{name: getattr(own, name) for name in names})


def _own_class(config: BasicCacheConfig) -> type[OwnCacheConfig]:
    return cachedit_fx.DBPruneConfig if config.cache_type is CacheType.DBPrune else OwnCacheConfig


def _plain(value: Any) -> Any:
    """A number for a tensor of one element, a tuple for a list, for a set and for a string of digits."""
    if isinstance(value, str) and value.isdecimal():
        return tuple(map(int, value))
    if isinstance(value, (list, set, frozenset, range)):
        return tuple(value)
    return value.item() if hasattr(value, "item") else value


def _not_ours(name: str, config: Any, expected: str) -> str:
    kind = type(config)
    if kind.__module__.partition(".")[0] == "cache_dit":
        return f"{name}: this {kind.__name__} is of the package cache_dit; import it from cachedit_fx.compat"
    return f"{name}={config!r} is not allowed: it must be a {expected} of cachedit_fx.compat, or None"
