"""`enable_cache`, `disable_cache` and `refresh_context` under cache-dit's arguments, by those of `cachedit_fx`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain, repeat
from typing import Any, TypeVar

import torch

from cachedit_fx import api
from cachedit_fx.compat.adapters import WHOLE, BlockAdapter, BlockList, Part, adapter_of, lists_of, shares_of
from cachedit_fx.compat.configs import BasicCacheConfig, CacheType, new_config
from cachedit_fx.compat.kept import forget, keep, kept_of
from cachedit_fx.compat.modifiers import own_modifier, split_flat, without_others
from cachedit_fx.compat.ours import check_ours
from cachedit_fx.compat.parallelism import ParallelismConfig, attention_option, checked_backend
from cachedit_fx.compat.quantization import QuantizeConfig, quantize
from cachedit_fx.compat.translation import (
    AnyCacheConfig,
    AnyCalibratorConfig,
    changed_calibrator,
    changed_config,
    check_cache_config,
    own_cache_config,
    own_calibrator_config,
    own_values,
    settings_of,
)
from cachedit_fx.config.cache import DBCacheConfig as OwnCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig as OwnCalibratorConfig
from cachedit_fx.config.options import Options, ParamsModifier, Scope
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.registry import states_of, unwrapped

Model = TypeVar("Model")

_OWN_OPTIONS = {each.name for each in fields(Options)} - {"cache", "calibrator", "params_modifiers"}
_OWN_OPTIONS |= {"fullgraph", "dynamic", "recompile_limit", "guards"}

_DEFAULTS = {
    "ulysses_size": 1,
    "ring_size": 1,
    "ulysses_float8": False,
    "ulysses_async": False,
    "attention": None,
}
"""Of the options that settings beside the cache stand for."""

ONE_CHAIN = {"FluxTransformer2DModel"}
"""Transformers whose block lists decide together if no adapter names them, as in cache-dit 1.5.3."""


def enable_cache(
    pipe_or_adapter: Model,
    cache_config: AnyCacheConfig | None = None,
    calibrator_config: AnyCalibratorConfig | None = None,
    params_modifiers: Any = None,
    parallelism_config: ParallelismConfig | None = None,
    attention_backend: str | None = None,
    quantize_config: QuantizeConfig | None = None,
    **settings: Any,
) -> Model:
    """Enable caching on a pipeline, a transformer or what an adapter names, and return the argument.

    Every block list decides separately, as in cache-dit: `scope="loop"` of `cachedit_fx.Options`. Those of FLUX.1
    decide together, unless an adapter names them. A second call takes the place of the first.

    Args:
        cache_config: `DBCacheConfig()` if left out, unless one of the last three configs is given: then no cache.
        params_modifiers: one, a list with one for each block list, or a list of lists, one for each transformer.
        parallelism_config: lets ranks share each sample, also without a cache. It stays in force until another one
            takes its place, or `disable_cache`.
        attention_backend: the option `attention`, in diffusers' spelling or ours (`set_attn_backend`).
        quantize_config: for the transformers, or for the pipeline's components that it names.
        **settings: fields of the cache config and of a calibrator, in the style of older scripts; and options of
            `cachedit_fx.enable_cache`, such as `inner_backend`.

    Raises:
        OptionError: on an unknown name, a value that is not allowed, configs of another package, or ranks that
            torch.distributed does not know.
        NotImplementedError: on settings that memory depends on, before a weight moves.
    """
    options = {name: settings.pop(name) for name in list(settings) if name in _OWN_OPTIONS}
    changes, flat_calibrator = split_flat(settings, "compat.enable_cache", _OWN_OPTIONS)
    check_cache_config(cache_config)
    check_ours("parallelism_config", parallelism_config, "ParallelismConfig", ParallelismConfig)
    check_ours("quantize_config", quantize_config, "QuantizeConfig", QuantizeConfig)
    others = parallelism_config, checked_backend(attention_backend), quantize_config
    if changes or (cache_config is None and (flat_calibrator or all(other is None for other in others))):
        cache_config = changed_config(cache_config, changes)
    cache = own_cache_config(cache_config)
    calibrator = own_calibrator_config(flat_calibrator or calibrator_config, cache_config)
    adapter = adapter_of(pipe_or_adapter)
    parts = adapter.parts()
    modifiers = shares_of(adapter.params_modifiers or params_modifiers, parts)
    to_quantize = [] if quantize_config is None else _to_quantize(adapter, quantize_config)
    if parallelism_config is not None:
        parallelism_config.check()
        attention_backend = checked_backend(parallelism_config.attention_backend) or attention_backend
    if cache is None and cache_config is not None:
        _disable(adapter)
    for part, share in zip(parts, modifiers, strict=True):
        kept = kept_of(part.module)
        more = _ranks_of(parallelism_config or kept.parallelism_config)
        more |= attention_option(attention_backend or kept.attention_backend)
        if cache is not None:
            own = _in_order(part, [own_modifier(each, cache, calibrator) for each in share], cache)
            lists = _lists_in_order(part)
            loops = [each.name for each in lists] or None
            api.enable_cache(
                part.module,
                cache,
                calibrator,
                params_modifiers=own,
                **{"scope": _scope_of(part, calibrator), "loops": loops} | more | options,
            )
            keep(part.module, lists=lists)
        else:
            _change(part.module, more, options)
        keep(part.module, parallelism_config=parallelism_config, attention_backend=attention_backend)
    for module, config in to_quantize:
        quantize(module, config)
    return pipe_or_adapter


def _ranks_of(config: ParallelismConfig | None) -> dict[str, Any]:
    """The options that a config stands for, if it has some."""
    if config is None or (config.ulysses_size is None and config.ring_size is None):
        return {}
    own = {
        "ulysses_size": config.ulysses_size or 1,
        "ring_size": config.ring_size or 1,
        "ulysses_async": config.ulysses_async,
    }
    return own | ({"ulysses_float8": True} if config.ulysses_float8 else {})


def set_attn_backend(pipe_or_adapter: Any, attention_backend: str | None = None) -> None:
    """Let a back end compute the transformers' attention, with the cache that they have, or without one.

    It stays in force until another one takes its place, or `disable_cache`. "native" is the model's own attention.

    Raises:
        OptionError: on an unknown name, or a back end that does not run on this machine.
    """
    change = attention_option(checked_backend(attention_backend))
    for module in adapter_of(pipe_or_adapter).modules():
        _change(module, change, {})
        keep(module, attention_backend=attention_backend)


def _change(module: torch.nn.Module, change: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Change options of a module, if that changes anything, and leave its cache as it is."""
    present = _present_options(module)
    defaults = {name: _DEFAULTS[name] for name in change}
    if {**present, **change} != defaults | present:
        api.enable_cache(module, **{**present, **change, **options})


def _present_options(module: torch.nn.Module) -> dict[str, Any]:
    """The module's options; those without a cache if it is not enabled."""
    state = next(iter(states_of(module)), None)
    if state is None:
        return {"cache": None}
    return {each.name: getattr(state.asked, each.name) for each in fields(Options)}


def disable_cache(pipe_or_adapter: Model) -> Model:
    """Give the plain modules back, and return the argument. Quantized weights stay quantized."""
    adapter = adapter_of(pipe_or_adapter)
    for module in adapter.modules():
        forget(module)
    _disable(adapter)
    return pipe_or_adapter


def _disable(adapter: BlockAdapter) -> None:
    """Give the plain modules back; the pipeline first, since what `torch.compile` returned is replaced there."""
    for target in (*adapter.pipelines(), *adapter.modules()):
        api.disable_cache(target)


def refresh_context(
    transformer: Model,
    *,
    cache_config: AnyCacheConfig | None = None,
    calibrator_config: AnyCalibratorConfig | None = None,
    verbose: bool = False,
    **changes: Any,
) -> Model:
    """Let the next call start a new generation, and change settings. Returns the argument.

    Args:
        transformer: enabled before; a pipeline or an adapter too.
        cache_config: its fields that are not None replace the present ones, those of `params_modifiers` included.
        calibrator_config: in place of the present one.
        verbose: print the config that now holds.
        **changes: fields of the cache config and of a calibrator, such as `num_inference_steps=28`.

    Raises:
        ValueError: if a transformer was never enabled.
        OptionError: on an unknown name, or a value that is not allowed.
    """
    check_cache_config(cache_config)
    values, flat_calibrator = split_flat(without_others(changes, "refresh_context"), "compat.refresh_context")
    if "cache_type" in values:
        empty = new_config(values["cache_type"]).reset()
        cache_config = empty if cache_config is None else changed_config(cache_config, values)
    if isinstance(cache_config, BasicCacheConfig) and cache_config.cache_type is CacheType.NONE:
        raise OptionError("cache_type NONE: refresh_context switches no cache off; use disable_cache")
    values = settings_of(cache_config) | own_values(values)
    values.pop("cache_type", None)
    for part in adapter_of(transformer).parts():
        state = next(iter(states_of(part.module)), None)
        if state is not None and values and state.options.params_modifiers:
            modifiers = _changed(state.options, values, kept_of(part.module).lists)
            api.enable_cache(part.module, **_present_options(part.module) | {"params_modifiers": modifiers})
        present = None if state is None else state.options.calibrator
        calibrator = changed_calibrator(flat_calibrator or calibrator_config, present, cache_config)
        config = None if state is None or state.config is None else _refreshed(state.config, cache_config, values)
        api.refresh_context(part.module, cache_config=config, calibrator_config=calibrator, verbose=verbose)
    return transformer


def _changed(options: Options, values: dict[str, Any], lists: Sequence[BlockList]) -> list[ParamsModifier]:
    """The modifiers of the options, with these values in place of their own."""
    return [
        ParamsModifier(entry.cache_config, entry.calibrator_config, **dict(entry.changes) | _within(blocks, values))
        for entry, blocks in zip(options.params_modifiers, chain(lists, repeat(WHOLE)), strict=False)
    ]


def _refreshed(present: OwnCacheConfig, config: AnyCacheConfig | None, values: dict[str, Any]) -> OwnCacheConfig:
    """The present config with these values, as one of the kind of the new config."""
    other = own_cache_config(config, present)
    return (present if other is None or type(other) is type(present) else other).reset(**values)


def _scope_of(part: Part, calibrator: OwnCalibratorConfig | None) -> Scope | None:
    """ "loop" where cache-dit has a cache for each block list; None leaves it to the options."""
    is_joint = part.lists is None and type(unwrapped(part.module)).__name__ in ONE_CHAIN
    predicts_output = calibrator is not None and calibrator.calibrator_cache_type == "output"
    return None if is_joint or predicts_output else "loop"


def _lists_in_order(part: Part) -> tuple[BlockList, ...]:
    """The part's block lists in the order in which the transformer has them; empty if they are found automatically."""
    position = {name: index for index, name in enumerate(lists_of(part.module))}
    return tuple(sorted(part.lists or (), key=lambda each: position[each.name]))


def _in_order(part: Part, modifiers: Sequence[ParamsModifier], shared: OwnCacheConfig) -> list[ParamsModifier]:
    """The modifiers in the order in which the transformer has the block lists."""
    if part.lists is None:
        return list(modifiers)
    if len(modifiers) > len(part.lists):
        raise OptionError(f"params_modifiers has {len(modifiers)} entries for {len(part.lists)} block lists")
    is_sliced = any(each.before or each.after for each in part.lists)
    rest = [ParamsModifier()] * (len(part.lists) - len(modifiers)) if modifiers or is_sliced else []
    by_list = dict(zip(part.lists, [*modifiers, *rest], strict=False))
    return [_cut(each, by_list[each], shared) for each in _lists_in_order(part) if each in by_list]


def _cut(blocks: BlockList, modifier: ParamsModifier, shared: OwnCacheConfig) -> ParamsModifier:
    """The modifier of a list whose blocks outside the slice are computed at every step."""
    if not blocks.before and not blocks.after:
        return modifier
    config = modifier.config(shared)
    ends = {name: getattr(config, name) for name in ("Fn_compute_blocks", "Bn_compute_blocks")}
    changes = dict(modifier.changes) | _within(blocks, ends)
    return ParamsModifier(modifier.cache_config, modifier.calibrator_config, **changes)


def _within(blocks: BlockList, values: dict[str, Any]) -> dict[str, Any]:
    """The values of fields, with F and B raised by the blocks outside the slice."""
    outside = {"Fn_compute_blocks": blocks.before, "Bn_compute_blocks": blocks.after}
    return {name: value + outside[name] if name in outside else value for name, value in values.items()}


def _to_quantize(adapter: BlockAdapter, config: QuantizeConfig) -> list[tuple[torch.nn.Module, QuantizeConfig]]:
    """The transformers, or the components that the config names, each with its config."""
    if config.components_to_quantize is None:
        return [(module, config) for module in adapter.modules()]
    components = getattr(adapter.pipe, "components", {})
    configs = config.by_component()
    missing = [name for name in configs if not isinstance(components.get(name), torch.nn.Module)]
    if missing:
        raise OptionError(
            f"components_to_quantize: the pipeline has no module {', '.join(map(repr, missing))}; it has "
            f"{', '.join(name for name, each in components.items() if isinstance(each, torch.nn.Module)) or 'none'}"
        )
    return [(components[name], each) for name, each in configs.items()]
