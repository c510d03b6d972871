"""`enable_cache`, `disable_cache` and `refresh_context` under cache-dit's arguments, by those of `cachedit_fx`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch

from cachedit_fx import api
from cachedit_fx.compat.adapters import BlockAdapter, BlockAdapterRegister, Part, lists_of, shares_of
from cachedit_fx.compat.configs import (
    AnyCacheConfig,
    AnyCalibratorConfig,
    CacheType,
    new_config,
    own_cache_config,
    own_calibrator_config,
    own_modifier,
    own_values,
    settings_of,
    split_flat,
)
from cachedit_fx.compat.kept import forget, keep
from cachedit_fx.compat.parallelism import ParallelismConfig, set_attn_backend
from cachedit_fx.compat.quantization import QuantizeConfig, quantize
from cachedit_fx.config.cache import DBCacheConfig as OwnCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig as OwnCalibratorConfig
from cachedit_fx.config.options import Options, ParamsModifier, Scope
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.registry import states_of, transformers_of, unwrapped

Model = TypeVar("Model")

_OWN_OPTIONS = {each.name for each in fields(Options)} - {"cache", "calibrator", "params_modifiers"}
_OWN_OPTIONS |= {"fullgraph", "dynamic", "recompile_limit", "guards"}

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
        parallelism_config, attention_backend: kept, without effect (`ParallelismConfig`, `set_attn_backend`).
        quantize_config: for the transformers, or for the pipeline's components that it names.
        **settings: fields of the cache config and of a calibrator, in the style of older scripts; and options of
            `cachedit_fx.enable_cache`, such as `inner_backend`.

    Raises:
        OptionError: on an unknown name, a value that is not allowed, or configs of another package.
        NotImplementedError: on settings that memory or ranks depend on, before a weight moves.
    """
    options = {name: settings.pop(name) for name in list(settings) if name in _OWN_OPTIONS}
    changes, flat_calibrator = split_flat(settings, "compat.enable_cache", _OWN_OPTIONS)
    if parallelism_config is not None:
        parallelism_config.check()
    others = parallelism_config, attention_backend, quantize_config
    kind = changes.pop("cache_type", CacheType.DBCache)
    if cache_config is None and (changes or flat_calibrator or all(other is None for other in others)):
        cache_config = new_config(kind)
    cache = own_cache_config(cache_config)
    calibrator = own_calibrator_config(flat_calibrator or calibrator_config, cache_config)
    adapter = _adapter_of(pipe_or_adapter)
    parts = adapter.parts()
    if cache is not None:
        modifiers = shares_of(adapter.params_modifiers or params_modifiers, parts)
        for part, share in zip(parts, modifiers, strict=True):
            loops, own = _in_order(part, [own_modifier(each) for each in share])
            api.enable_cache(
                part.module,
                cache.reset(**own_values(changes)),
                calibrator,
                params_modifiers=own,
                **{"scope": _scope_of(part, calibrator), "loops": loops} | options,
            )
    for part in parts:
        keep(part.module, parallelism_config=parallelism_config)
    set_attn_backend(adapter, attention_backend)
    if quantize_config is not None:
        _quantize(adapter, quantize_config)
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: Model) -> Model:
    """Give the plain modules back, and return the argument. Quantized weights stay quantized."""
    targets: list[Any] = [pipe_or_adapter]
    if isinstance(pipe_or_adapter, BlockAdapter):
        targets = [*pipe_or_adapter.modules(), *pipe_or_adapter.pipelines()]
    for target in targets:
        for module in transformers_of(target):
            forget(module)
        api.disable_cache(target)
    return pipe_or_adapter


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
    values, flat_calibrator = split_flat(changes, "compat.refresh_context")
    values = settings_of(cache_config) | own_values(values)
    calibrator = own_calibrator_config(flat_calibrator or calibrator_config, cache_config)
    for part in _adapter_of(transformer).parts():
        state = next(iter(states_of(part.module)), None)
        if state is not None and values and state.options.params_modifiers:
            options = {each.name: getattr(state.options, each.name) for each in fields(Options)}
            api.enable_cache(part.module, **options | {"params_modifiers": _changed(state.options, values)})
        config = None if state is None or state.config is None else _refreshed(state.config, cache_config, values)
        api.refresh_context(part.module, cache_config=config, calibrator_config=calibrator, verbose=verbose)
    return transformer


def _changed(options: Options, values: dict[str, Any]) -> list[ParamsModifier]:
    """The modifiers of the options, with these values in place of their own."""
    return [
        ParamsModifier(entry.cache_config, entry.calibrator_config, **dict(entry.changes) | values)
        for entry in options.params_modifiers
    ]


def _refreshed(present: OwnCacheConfig, config: AnyCacheConfig | None, values: dict[str, Any]) -> OwnCacheConfig:
    """The present config with these values, or the new one if it is of another kind."""
    other = own_cache_config(config)
    return (present if other is None or type(other) is type(present) else other).reset(**values)


def _scope_of(part: Part, calibrator: OwnCalibratorConfig | None) -> Scope | None:
    """ "loop" where cache-dit has a cache for each block list; None leaves it to the options."""
    is_joint = part.loops is None and type(unwrapped(part.module)).__name__ in ONE_CHAIN
    predicts_output = calibrator is not None and calibrator.calibrator_cache_type == "output"
    return None if is_joint or predicts_output else "loop"


def _adapter_of(pipe_or_adapter: Any) -> BlockAdapter:
    if isinstance(pipe_or_adapter, BlockAdapter):
        return pipe_or_adapter
    if type(pipe_or_adapter).__module__.partition(".")[0] == "cache_dit":
        kind = type(pipe_or_adapter).__name__
        raise OptionError(f"this {kind} is of the package cache_dit; import it from cachedit_fx.compat")
    return BlockAdapterRegister.get_adapter(pipe_or_adapter)


def _in_order(part: Part, modifiers: Sequence[ParamsModifier]) -> tuple[list[str] | None, list[ParamsModifier]]:
    """The part's block lists in the order in which the transformer has them, and the modifiers in the same order."""
    if part.loops is None:
        return None, list(modifiers)
    if len(modifiers) > len(part.loops):
        raise OptionError(f"params_modifiers has {len(modifiers)} entries for {len(part.loops)} block lists")
    position = {name: index for index, name in enumerate(lists_of(part.module))}
    shared = [ParamsModifier()] * (len(part.loops) - len(modifiers)) if modifiers else []
    loops = sorted(part.loops, key=position.__getitem__)
    by_loop = dict(zip(part.loops, [*modifiers, *shared], strict=False))
    return loops, [by_loop[name] for name in loops if name in by_loop]


def _quantize(adapter: BlockAdapter, config: QuantizeConfig) -> None:
    """Quantize the transformers, or the components that the config names."""
    if config.components_to_quantize is None:
        for module in adapter.modules():
            quantize(module, config)
        return
    components = getattr(adapter.pipe, "components", {})
    configs = config.by_component()
    missing = [name for name in configs if not isinstance(components.get(name), torch.nn.Module)]
    if missing:
        raise OptionError(
            f"components_to_quantize: the pipeline has no module {', '.join(map(repr, missing))}; it has "
            f"{', '.join(name for name, each in components.items() if isinstance(each, torch.nn.Module)) or 'none'}"
        )
    for name, each in configs.items():
        quantize(components[name], each)
