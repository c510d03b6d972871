"""What a user calls: compile a module, enable a pipeline, read what happened."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args

import torch
from torch import fx

from cachedit_fx.backend import compile_graph, pass_manager
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.options import Options, ParamsModifier, parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.base import Traced
from cachedit_fx.runtime.compiled_call import CompiledCall, Guards
from cachedit_fx.runtime.listener import listen, stop_listening
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.registry import register, state_of_module, states_of, unregister, unwrapped
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.schedules.presets import preset as preset_settings

Model = TypeVar("Model")


RECOMPILE_LIMIT = 64
"""Graphs of one model. Dynamo's own eight are soon used up: every adapter that is loaded makes one, as do autocast,
grad modes, a batch of one, other inputs; and what is beyond the limit runs eager, uncached."""


def compile(module: torch.nn.Module, **options: Any) -> torch.nn.Module:  # noqa: A001 - the name torch uses
    """Compile `module` in place with the cachedit backend, and return it.

    The module keeps its class, its state dict and its hooks; only its call is compiled (`module.compile` underneath),
    in isolation from other models of its class. A `copy.deepcopy` of it is uncompiled. Calling this again with other
    policy settings changes them and compiles nothing; other structural settings compile anew.

    Args:
        module: a diffusion transformer, taking one denoising step's inputs.
        **options: any field of `cachedit_fx.Options` or, flat, of its `cache`; and `fullgraph`, `dynamic`,
            `recompile_limit` (64 unless given), `mode` as in `torch.compile`. The first three hold until they are given
            again, and so does `guards`: "always" passes dynamo's guards at every call, "generation" at the first two
            calls of a kind in each generation only, which is safe as long as nothing about the module but the contents
            of its weights changes between two steps of one generation (no adapter set or scaled, no processor
            exchanged).

    Raises:
        OptionError: on an unknown or invalid option, before anything is compiled.
    """
    own = ("fullgraph", "dynamic", "recompile_limit")
    chosen: dict[str, Any] = {name: options.pop(name) for name in own if name in options}
    guards: Guards | None = options.pop("guards", None)
    if guards not in (None, *get_args(Guards)):
        raise OptionError(f"guards={guards!r}: expected {' or '.join(map(repr, get_args(Guards)))}")
    parsed = parse_options(options)
    _check_against(module, parsed)
    state, compiled = state_of_module(module), module._compiled_call_impl
    before = compiled if isinstance(compiled, CompiledCall) else None
    kept = before.torch_options if before else {}
    torch_options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, **kept, **chosen}
    guards = guards or (before.guards if before else "always")
    if state and before and torch_options == kept and state.options.structure() == parsed.structure():
        before.guards = guards
        state.set_policy(parsed)
        return module
    state = ModelState(parsed)
    state.traced = Traced.of(module)
    listener = listen(module)
    if listener is not None:
        state.hint = listener.hint
    weakly = weakref.ref(
        state
    )  # dynamo keeps a backend for good, and the state holds buffers; the module's call owns it

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        state = weakly()
        assert state is not None
        return compile_graph(gm, example_inputs, state.options, state)

    module._compiled_call_impl = CompiledCall(module, backend, state, torch_options, guards)
    register(module, state)
    return module


def _check_against(module: torch.nn.Module, options: Options) -> None:
    """Raise now on names that would otherwise fail, or do nothing, in the middle of a compilation."""
    pass_manager(options)
    parameters = inspect.signature(module.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if options.timestep is not None and options.timestep not in parameters and not open_ended:
        raise OptionError(
            f"timestep={options.timestep!r}: {type(module).__name__}.forward has no such argument; it has "
            f"{', '.join(parameters)}"
        )


def enable_cache(
    pipe_or_module: Model,
    cache_config: DBCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    *,
    preset: str | None = None,
    steps: int | None = None,
    **options: Any,
) -> Model:
    """Enable caching on a diffusers pipeline or a transformer, and return it.

    Args:
        pipe_or_module: a pipeline (every component named `transformer`, `transformer_2`, ... is enabled) or a module.
        cache_config: when to reuse, a `DBCacheConfig` or `DBPruneConfig`; the defaults of the first if left out.
        calibrator_config: what predicts the bypassed part; if left out, what was stored last is used again.
        preset: a name of `cachedit_fx.presets`, in place of both configs; needs `steps`, the denoising steps of the
            generations to come.
        **options: as for `cachedit_fx.compile`. `params_modifiers` on a pipeline of several transformers: one entry, or
            a list of them, for each.
    """
    if (preset is None) != (steps is None):
        raise OptionError("preset and steps go together: enable_cache(pipe, preset='fast', steps=28)")
    if preset is not None and steps is not None:
        if cache_config is not None or calibrator_config is not None:
            raise OptionError("preset stands for cache_config and calibrator_config: leave those out, or preset")
        chosen = preset_settings(preset, steps)
        cache_config, calibrator_config = chosen["cache_config"], chosen["calibrator_config"]
    for name, given in (("cache", cache_config), ("calibrator", calibrator_config)):
        if given is not None and name in options:
            raise OptionError(f"{name} and {name}_config are two names for one thing: pass one of them")
        if given is not None:
            options[name] = given
    modules = transformers_of(pipe_or_module)
    if any(map(_is_optimized, modules)):
        raise OptionError(
            "this module is what torch.compile returned; pass the options to torch.compile(..., "
            "backend='cachedit', options={...}), or call enable_cache on the module itself"
        )
    for module, modifiers in zip(modules, _modifiers_of(modules, options.pop("params_modifiers", ())), strict=True):
        compile(module, **options, params_modifiers=modifiers)
    return pipe_or_module


def _modifiers_of(modules: Sequence[torch.nn.Module], given: Any) -> list[Any]:
    """The `params_modifiers` of each of several transformers: an entry each, itself a list or for all loops."""
    if len(modules) == 1 or not given:
        return [given] * len(modules)
    if not isinstance(given, (list, tuple)) or len(given) != len(modules):
        raise OptionError(
            f"params_modifiers: this pipeline has {len(modules)} transformers; give a list of {len(modules)}, each a "
            "ParamsModifier or a list of one for each of its block loops"
        )
    return [[item] if isinstance(item, ParamsModifier) else item for item in given]


def disable_cache(pipe_or_module: Model) -> Model:
    """Give back the plain, uncompiled module or pipeline. What was never enabled is left as it is."""
    for module in transformers_of(pipe_or_module):
        module = unwrapped(module)
        if state_of_module(module) is not None:
            module._compiled_call_impl = None
            stop_listening(module)
            unregister(module)
    return pipe_or_module


def refresh_context(
    pipe_or_module: Model,
    num_inference_steps: int | None = None,
    cache_config: DBCacheConfig | None = None,
    verbose: bool = False,
    calibrator_config: CalibratorConfig | None = None,
) -> Model:
    """Let the next call start a new generation, if wanted under another policy. Compiles nothing unless F or B change.

    Args:
        pipe_or_module: enabled before.
        num_inference_steps: steps of the coming generation; optional, since generations are found from the timestep.
        cache_config, calibrator_config: a new policy and a new predictor, in place of the old.
        verbose: print the policy that now holds.
    """
    for module in transformers_of(pipe_or_module):
        states = [state for state in states_of(module) if state.config is not None]
        if not states:
            raise ValueError(
                f"{type(unwrapped(module)).__name__} has no cache to refresh: call enable_cache first; a model that "
                "torch.compile(backend='cachedit') returned has one from its first call on"
            )
        for state in states:
            config = cache_config or state.config or DBCacheConfig()
            if num_inference_steps is not None:
                config = config.reset(num_inference_steps=num_inference_steps)
            options = replace(state.options, cache=config, calibrator=calibrator_config or state.options.calibrator)
            if options.structure() == state.options.structure():
                state.set_policy(options)
            elif state is state_of_module(unwrapped(module)):
                compile(unwrapped(module), **{item.name: getattr(options, item.name) for item in fields(Options)})
            else:
                raise OptionError(
                    "Fn_compute_blocks, Bn_compute_blocks, non_prune_block_ids, the class of the config and whether "
                    "the model's output is predicted shape the compiled graph: call torch.compile again to change "
                    "them, or use cachedit_fx.compile, which does so by itself"
                )
            if verbose:
                from rich import print as rich_print

                rich_print(config)
    return pipe_or_module


def summary(pipe_or_module: Any, details: bool = False) -> list[CacheStats]:
    """Statistics of the latest generation, one entry for each region; with `details` they are printed as tables.
    With DBPrune a chain of blocks has one entry.

    Accepts a pipeline, a module, or what `torch.compile` returned.
    """
    stats: list[CacheStats] = []
    for module in transformers_of(pipe_or_module):
        for state in states_of(module):
            if state.latest is not None:
                stats.extend(state.latest.summary())
    if details:
        from rich import print as rich_print

        from cachedit_fx.report.stats import render

        rich_print(render(stats, details=True) if stats else "no statistics: nothing has run with the cache")
    return stats


def transformers_of(pipe_or_module: Any) -> list[torch.nn.Module]:
    """The modules meant: the module itself, or a pipeline's components named `transformer...`.

    Raises:
        TypeError: where there is none.
    """
    if isinstance(pipe_or_module, torch.nn.Module):
        return [pipe_or_module]
    components = getattr(pipe_or_module, "components", None)
    if isinstance(components, dict):
        found = [
            module
            for name, module in components.items()
            if name.startswith("transformer") and isinstance(module, torch.nn.Module)
        ]
        if found:
            return found
        raise TypeError(
            f"{type(pipe_or_module).__name__} has no component named 'transformer...'; it has "
            f"{', '.join(components)}. Pass the module itself"
        )
    raise TypeError(f"expected a torch.nn.Module or a diffusers pipeline, not {type(pipe_or_module).__name__}")


def _is_optimized(module: torch.nn.Module) -> bool:
    return unwrapped(module) is not module
