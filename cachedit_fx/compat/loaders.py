"""Reads settings from YAML files and dicts in cache-dit's form.

    cache_config: {max_warmup_steps: 8, steps_computation_mask: fast, num_inference_steps: 28, enable_taylorseer: true}
    parallelism_config: {ulysses_size: auto}
    attention_backend: native
    quantize_config: {quant_type: float8_weight_only}

A flat file has the keys of `cache_config` at the top. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cachedit_fx.compat.configs import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBPruneConfig,
    new_config,
)
from cachedit_fx.compat.modifiers import OTHER_SECTIONS, split_flat
from cachedit_fx.compat.ours import reject_other_package
from cachedit_fx.compat.parallelism import ParallelismConfig, checked_backend
from cachedit_fx.compat.quantization import QuantizeConfig
from cachedit_fx.config.rules import OptionError, reject_unknown

_SECTIONS = ("cache_config", *OTHER_SECTIONS)
_OPTIONS = ("reset", "check_only", "auto_parallel_size")
_SIZES = {"ulysses": "ulysses_size", "ring": "ring_size", "tp": "tp_size"}


def load_configs(path_or_dict: Any, return_dict: bool = True, **options: Any) -> Any:
    """Every config of a YAML file or a dict, for `enable_cache(pipe, **load_configs(path))`.

    Args:
        path_or_dict: a path, or a mapping in the same form.
        return_dict: a dict with the keys of `enable_cache`'s arguments; otherwise a tuple in the same order.
        **options: `reset=True` leaves the fields that are not given None, for `ParamsModifier`. The other loaders'
            options are `check_only` and `auto_parallel_size`; each of them takes all.

    Raises:
        OptionError: on an unknown key, a value that is not allowed, or more than one calibrator.
        FileNotFoundError: if there is no such file.
    """
    settings = _settings(path_or_dict, options)
    cache, calibrator = load_cache_config(settings, **options)
    parallelism = load_parallelism_config(settings, **options)
    configs = {
        "cache_config": cache,
        "calibrator_config": calibrator,
        "parallelism_config": None if isinstance(parallelism, bool) else parallelism,
        "attention_backend": load_attn_backend_config(settings),
        "quantize_config": load_quantize_config(settings),
    }
    return configs if return_dict else tuple(configs.values())


def load_cache_config(
    path_or_dict: Any, reset: bool = False, **options: Any
) -> tuple[BasicCacheConfig | None, CalibratorConfig | None]:
    """The cache config and the calibrator's config of a YAML file or a dict.

    Both are None if there are other sections and no `cache_config`.
    """
    settings = _settings(path_or_dict, options)
    if "cache_config" in settings:
        section = settings["cache_config"] or {}
    elif settings.keys() & {*_SECTIONS}:
        return None, None
    else:
        section = settings
    values, calibrator = split_flat(_checked(section, "cache_config"), "compat.load_configs", _SECTIONS)
    config = new_config(values.pop("cache_type", CacheType.DBCache))
    return (config.reset(**values) if reset else config.update(**values)), calibrator


def load_parallelism_config(
    path_or_dict: Any, check_only: bool = False, auto_parallel_size: bool = True, **options: Any
) -> ParallelismConfig | bool | None:
    """The `parallelism_config` of a YAML file or a dict, None without one; with `check_only` whether there is one.

    One of the sizes may be "auto", unless `auto_parallel_size` is False. It stands for all processes of
    `torch.distributed`, over the other sizes.
    """
    settings = _settings(path_or_dict, options)
    if check_only:
        return "parallelism_config" in settings
    if settings.get("parallelism_config") is None:
        return None
    section = dict(_checked(settings["parallelism_config"], "parallelism_config"))
    for alias, name in _SIZES.items():
        size = section.pop(alias, None)
        if size is not None and section.setdefault(name, size) != size:
            raise OptionError(f"{alias}={size!r} and {name}={section[name]!r} are two names for one size: give one")
    reject_unknown(section, dict.fromkeys([*ParallelismConfig.__dataclass_fields__, *_SIZES], "ParallelismConfig"))
    sizes = _SIZES.values() if auto_parallel_size else ()
    automatic = [name for name in sizes if str(section.get(name)).lower() == "auto"]
    if len(automatic) > 1:
        raise OptionError(f"{' and '.join(automatic)} are 'auto': only one of the sizes may be")
    for name in automatic:
        others = [section.get(other) or 1 for other in _SIZES.values() if other != name]
        section[name] = max(_processes() // (others[0] * others[1]), 1)
    return ParallelismConfig(**section)


def load_attn_backend_config(path_or_dict: Any, **options: Any) -> str | None:
    """The `attention_backend` of a YAML file or a dict; None without one."""
    return checked_backend(_settings(path_or_dict, options).get("attention_backend"))


def load_quantize_config(path_or_dict: Any, **options: Any) -> QuantizeConfig | None:
    """The `quantize_config` of a YAML file or a dict; None without one."""
    section = _settings(path_or_dict, options).get("quantize_config")
    if section is None:
        return None
    values = {name: value for name, value in _checked(section, "quantize_config").items() if value is not None}
    reject_unknown(values, dict.fromkeys(QuantizeConfig.__dataclass_fields__, "compat.QuantizeConfig"))
    return QuantizeConfig(**values)


def load_options(path_or_dict: Any, reset: bool = False) -> dict[str, Any]:
    """The older loader: a dict with `cache_config` and, if there is one, `calibrator_config`."""
    cache, calibrator = load_cache_config(path_or_dict, reset)
    return {"cache_config": cache} | ({} if calibrator is None else {"calibrator_config": calibrator})


def _settings(path_or_dict: Any, options: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The mapping, or what the file holds. `options` are those of any loader."""
    reject_unknown(options or (), dict.fromkeys(_OPTIONS, "compat.load_configs"))
    if isinstance(path_or_dict, Mapping):
        settings: Any = path_or_dict
    elif isinstance(path_or_dict, (str, Path)):
        settings = _read(Path(path_or_dict)) or {}
    else:
        raise OptionError(f"expected a path or a dict, not {type(path_or_dict).__name__}")
    settings = _checked(settings, str(path_or_dict))
    if settings.get("calibrator_config") is not None:
        raise OptionError(
            "calibrator_config: a calibrator is set in cache_config, by enable_taylorseer, enable_foca or enable_dmd: "
            "true, and names such as taylorseer_order"
        )
    if settings.keys() & {*_SECTIONS}:
        flat = {each.name for each in fields(DBPruneConfig)} & settings.keys()
        if flat:
            raise OptionError(f"{', '.join(sorted(flat))}: put it under cache_config, since the file has sections")
        reject_unknown(settings, dict.fromkeys(_SECTIONS, "compat.load_configs"))
    return settings


def _read(path: Path) -> Any:
    """What a YAML file holds. 8e-2 is a number, as in JSON; the standard of YAML asks for 8.0e-2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is no YAML: {error}") from error


def _checked(section: Any, name: str) -> Mapping[str, Any]:
    reject_other_package(section, f"{name}: ")
    if not isinstance(section, Mapping):
        raise OptionError(f"{name}: expected names with values, not {section!r}")
    return section


def _processes() -> int:
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
