"""Mutable configs with cache-dit's names. `compat.translation` makes the frozen configs of `cachedit_fx` of them.

    DBCacheConfig(max_warmup_steps=4)          all fields set: a whole config
    DBCacheConfig().reset(max_warmup_steps=4)  the other fields are None: changes of a shared config

A field that is None is left to the shared config, or to the default. A value is checked when it is set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Self

import cachedit_fx
from cachedit_fx.config.rules import FLAG, OptionError, Rule, check, choice, is_number, reject_unknown, setting


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

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, also when the config is made.

        Raises:
            OptionError: on an unknown name, or a value that is not allowed.
        """
        super().__setattr__(name, self._checked(name, value))

    def update(self, **values: Any) -> Self:
        """Set those of `values` that are not None, and return this config.

        Raises:
            OptionError: on an unknown name, or a value that is not allowed. Nothing is set then.
        """
        for name, value in {name: self._checked(name, value) for name, value in values.items()}.items():
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

    def _checked(self, name: str, value: Any) -> Any:
        """The value of a field, checked by the rule of `cachedit_fx` or of the field."""
        own_fields = getattr(getattr(cachedit_fx, self.own, None), "__dataclass_fields__", {})
        reject_unknown([name], dict.fromkeys((each.name for each in fields(self)), f"compat.{type(self).__name__}"))
        rule = (own_fields.get(name) or self.__dataclass_fields__[name]).metadata.get("rule")
        if value is not None and rule is not None:
            check(name, plain(value), rule)
        return value


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

    def _checked(self, name: str, value: Any) -> Any:
        if name == "cache_type" and value is not None:
            return cache_type(value)
        if name == "steps_computation_mask" and isinstance(value, str) and not value.isdecimal():
            raise OptionError(
                f"steps_computation_mask={value!r} is not allowed: it must be ones and zeros, such as "
                "steps_mask(mask_policy='fast', total_steps=28); load_configs and refresh_context take a policy's name"
            )
        names = {each.name for each in fields(self)}
        if name not in names and name in DBPruneConfig.__dataclass_fields__:
            raise OptionError(f"{name}: for DBPrune only; make a DBPruneConfig, or add cache_type: DBPrune")
        return super()._checked(name, value)


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
    force_reduce_calibrator_vram: bool = setting(False, FLAG)
    """Store the calibrator's values in the model's dtype: `calibrator_state_dtype="model"`."""

    def strify(self) -> str:
        """A short name for logs and files, such as "DBPrune_F8B0_W8I1M0MC0_R0.08"."""
        return _cut_and_limits(self)


def new_config(kind: CacheType | str | None = CacheType.DBCache) -> BasicCacheConfig:
    """A config of that cache type, with its defaults."""
    kind = cache_type(kind)
    return DBPruneConfig() if kind is CacheType.DBPrune else DBCacheConfig(cache_type=kind)


_TYPE = choice("taylorseer", "foca", "dmd")
_DICT = Rule(lambda value: isinstance(value, dict), "a dict")


@dataclass
class CalibratorConfig(_Mutable):
    """How a bypassed region's results are predicted; the base of the calibrators' own configs."""

    own: ClassVar[str] = "CalibratorConfig"
    kept: ClassVar[tuple[str, ...]] = ("calibrator_type",)

    enable_calibrator: bool = setting(False, FLAG)
    enable_encoder_calibrator: bool = setting(False, FLAG)
    """Has no effect: `enable_calibrator` decides for all streams of a region."""
    calibrator_type: str = setting("taylorseer", _TYPE)
    calibrator_cache_type: str = "residual"
    calibrator_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"rule": _DICT})
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

    enable_calibrator: bool = setting(True, FLAG)
    enable_encoder_calibrator: bool = setting(True, FLAG)
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

    enable_calibrator: bool = setting(True, FLAG)
    enable_encoder_calibrator: bool = setting(True, FLAG)
    calibrator_type: str = setting("foca", _TYPE)

    def strify(self, details: bool = False) -> str:
        """ "FoCa"."""
        return "FoCa"


@dataclass
class DMDCalibratorConfig(CalibratorConfig):
    """Dynamic mode decomposition of the latest computed steps."""

    own: ClassVar[str] = "DMDCalibratorConfig"

    enable_calibrator: bool = setting(True, FLAG)
    enable_encoder_calibrator: bool = setting(True, FLAG)
    calibrator_type: str = setting("dmd", _TYPE)
    dmd_history: int = 6
    dmd_rank: int = 0
    dmd_ridge: float = setting(1e-8, Rule(is_number, "a number"))
    dmd_svd_precision: str = setting("medium", choice("low", "medium", "high"))

    def strify(self, details: bool = False) -> str:
        """ "DMDH6" for six steps, "DMD_H(6, medium)" with `details`."""
        precision = self.dmd_svd_precision or "medium"
        if details:
            return f"DMD_H({self.dmd_history}, {precision})"
        return f"DMDH{self.dmd_history}{'' if precision == 'medium' else precision[0]}"

    def to_kwargs(self) -> dict[str, Any]:
        names = {"history": self.dmd_history, "rank": self.dmd_rank, "ridge": self.dmd_ridge}
        return super().to_kwargs() | names | {"svd_precision": self.dmd_svd_precision}


def plain(value: Any) -> Any:
    """A number for a tensor of one element, a tuple for a longer one, for a list, a set and a string of digits."""
    if isinstance(value, str) and value.isdecimal():
        return tuple(map(int, value))
    if hasattr(value, "tolist"):
        value = value.item() if math.prod(value.shape) == 1 else value.tolist()
    return tuple(value) if isinstance(value, (list, set, frozenset, range)) else value
