"""The functions that a user calls: compile a module, enable a pipeline, read the statistics."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args

import torch
from torch import fx

from cachedit_fx.backend import compile_graph
from cachedit_fx.capture import RECOMPILE_LIMIT, is_wrapper, on_compile, unwrap_call
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.options import Options, ParamsModifier, parse_options
from cachedit_fx.config.rules import FLAG, OptionError, check, integer, optional
from cachedit_fx.kernels.cpu import compiler
from cachedit_fx.pass_pipeline import pass_manager
from cachedit_fx.passes.base import Traced
from cachedit_fx.placement import Placement, bring_back, wait_on_host
from cachedit_fx.quantization.copies import WeightCopies
from cachedit_fx.runtime.compiled_call import CompiledCall, Guards
from cachedit_fx.runtime.listener import listen, stop_listening
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.policies.preset import PresetConfig
from cachedit_fx.runtime.registry import (
    Registration,
    put_all_back,
    put_back,
    register,
    state_of_module,
    states_of,
    transformers_of,
    unregister,
    unwrapped,
)
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.warning import warn

Model = TypeVar("Model")


TORCH_RULES = {
    "fullgraph": FLAG,
    "dynamic": optional(FLAG),
    "recompile_limit": integer(1, "a number of graphs"),
}
"""Keyword of `torch.compile` -> the values that it may have."""


def compile(module: torch.nn.Module, **options: Any) -> torch.nn.Module:  # noqa: A001 - the name torch uses
    """Compile `module` in place with the cachedit backend, and return it.

    The module keeps its class, its state dict and its hooks. Only its call is compiled, in isolation from other models
    of its class. A `copy.deepcopy` of the module is uncompiled. Calling `compile` again with other settings that are
    read at each call changes them and compiles nothing; other structural settings compile anew.

    Args:
        module: a diffusion transformer. One call takes the inputs of one denoising step.
        **options: any field of `cachedit_fx.Options` or, flat, of its `cache`; also `fullgraph`, `dynamic` and
            `recompile_limit` (64 by default), as in `torch.compile`, and `guards`. These four hold until they are
            passed again.

            `guards="always"` passes dynamo's guards at every call. "generation" passes them only at the first two calls
            of a kind in each generation. This is safe if only the contents of the module's weights change between two
            steps of one generation. No adapter may be set or scaled, no processor exchanged.

    Raises:
        OptionError: on an unknown or invalid option, before anything is compiled.
    """
    changes: dict[str, Any] = {name: options.pop(name) for name in TORCH_RULES if name in options}
    for name, value in changes.items():
        check(name, value, TORCH_RULES[name])
    guards: Guards | None = options.pop("guards", None)
    if guards not in (None, *get_args(Guards)):
        raise OptionError(f"guards={guards!r}: expected {' or '.join(map(repr, get_args(Guards)))}")
    settings = parse_options(options)
    _check_against(module, settings)
    _warn_without_compiler(settings)
    state, compiled = state_of_module(module), module._compiled_call_impl
    previous = compiled if isinstance(compiled, CompiledCall) else None
    previous_options = previous.torch_options if previous else {}
    torch_options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, **previous_options, **changes}
    guards = guards or (previous.guards if previous else "always")
    is_same = state is not None and state.asked.structure() == settings.structure() and not state.has_lost_ranks
    if state and previous and torch_options == previous_options and is_same:
        previous.guards = guards
        state.set_options(settings)
        state.announce()
        return module
    copies = None if settings.precision is None else WeightCopies(module, settings.precision.request)
    is_on_host = settings.time_weights == "host"
    if state is not None and not is_on_host:
        bring_back(module)
    state = ModelState(settings, type(module).__name__)
    state.announce()
    state.traced, state.copies = Traced.of(module), copies
    place = Placement(settings, state.traced, state.warn_once) if is_on_host else None
    # Dynamo keeps a backend for good, and the state holds buffers: the module's call owns the state.
    state_ref = weakref.ref(state)

    def end_generation() -> None:
        state = state_ref()
        if state is not None:
            state.end_generation()

    listener = listen(module, end_generation, put_back)
    if listener is not None:
        state.hint = listener.hint
    on_compile(put_all_back)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        state = state_ref()
        assert state is not None
        return compile_graph(gm, example_inputs, state.options, state)

    def make_call(module: torch.nn.Module) -> CompiledCall:
        state = state_ref()
        assert state is not None
        return CompiledCall(module, backend, state, torch_options, guards, place)

    register(module, Registration(state, make_call))
    if is_on_host:
        wait_on_host(module)
    return module


def _check_against(module: torch.nn.Module, options: Options) -> None:
    """Raise on names that would otherwise fail, or have no effect, during compilation."""
    pass_manager(options)
    if options.attention is not None:
        options.attention.check([name for name, _ in module.named_modules()])
    parameters = inspect.signature(module.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if options.timestep is not None and options.timestep not in parameters and not open_ended:
        raise OptionError(
            f"timestep={options.timestep!r}: {type(module).__name__}.forward has no such argument; it has "
            f"{', '.join(parameters)}"
        )


def _warn_without_compiler(options: Options) -> None:
    """Warn before the first call if inductor will find no C++ compiler, which it needs for CPUs and GPUs."""
    if options.inner_backend == "inductor" and compiler() is None:
        warn(
            "inner_backend='inductor' needs a C++ compiler, and none was found: the first call will fail. Install one "
            "(on Debian: apt-get install g++ python3-dev), set CXX, or pass inner_backend='eager'"
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
        cache_config: when to reuse: a `DBCacheConfig` or `DBPruneConfig`. `DBCacheConfig()` if left out.
        calibrator_config: how the results of a bypassed region are predicted. If left out, the values stored last are
            used again.
        preset: a name of `cachedit_fx.presets`, in place of both configs.
        steps: denoising steps of the coming generations, for `preset` in a loop of your own. A pipeline's scheduler
            tells them.
        **options: as for `cachedit_fx.compile`. For a pipeline of several transformers `params_modifiers` is a list:
            one entry, or a list of entries, for each transformer.

    Raises:
        OptionError: on an unknown or invalid option, on options that exclude each other, or on a module that
            `torch.compile` returned.
        TypeError: if there is no transformer.
    """
    if steps is not None and preset is None:
        raise OptionError("steps goes with preset: enable_cache(pipe, preset='fast', steps=28)")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps={steps!r} is not allowed: it must be a number of denoising steps, such as 28")
    if preset is not None:
        if cache_config is not None or calibrator_config is not None:
            raise OptionError("preset stands for cache_config and calibrator_config: leave those out, or preset")
        cache_config = PresetConfig(preset=preset, steps=steps)
    for name, config in (("cache", cache_config), ("calibrator", calibrator_config)):
        if config is not None and name in options:
            raise OptionError(f"{name} and {name}_config are two names for one thing: pass one of them")
        if config is not None:
            options[name] = config
    modules = [_without_shell(module) for module in transformers_of(pipe_or_module)]
    if any(unwrapped(module) is not module for module in modules):
        raise OptionError(
            "this module is what torch.compile returned; pass the options to torch.compile(..., "
            "backend='cachedit', options={...}), or call enable_cache on the module itself"
        )
    for module, modifiers in zip(modules, _modifiers_of(modules, options.pop("params_modifiers", ())), strict=True):
        compile(module, **options, params_modifiers=modifiers)
    return pipe_or_module


def _modifiers_of(modules: Sequence[torch.nn.Module], modifiers: Any) -> list[Any]:
    """The `params_modifiers` of each transformer. With several transformers, `modifiers` has one entry for each."""
    if len(modules) == 1 or not modifiers:
        return [modifiers] * len(modules)
    if not isinstance(modifiers, (list, tuple)) or len(modifiers) != len(modules):
        raise OptionError(
            f"params_modifiers: this pipeline has {len(modules)} transformers; give a list of {len(modules)}, each a "
            "ParamsModifier or a list of one for each of its block loops"
        )
    return [[entry] if isinstance(entry, ParamsModifier) else entry for entry in modifiers]


def disable_cache(pipe_or_module: Model) -> Model:
    """Make a module or pipeline uncompiled again, and return it. A module that was never enabled stays as it is.

    An object that `torch.compile(module, backend="cachedit")` returned becomes a plain wrapper of its module. In a
    pipeline the module itself takes its place. The same holds for what `torch.compile` made of an enabled module,
    whatever the backend. Other objects of other backends stay as they are.
    """
    for module in transformers_of(pipe_or_module):
        inner = unwrapped(module)
        for state in states_of(inner):
            state.leave_ranks("disabled the cache")
        is_shell = inner is not module and (is_wrapper(module) or state_of_module(inner) is not None)
        if state_of_module(inner) is not None:
            inner._compiled_call_impl = None
            bring_back(inner)
            stop_listening(inner)
            unregister(inner)
        elif inner._compiled_call_impl is not None and states_of(inner):
            inner._compiled_call_impl = None  # of torch.nn.Module.compile(backend="cachedit")
        if is_shell:
            unwrap_call(module)
            for name, component in getattr(pipe_or_module, "components", {}).items():
                if component is module:
                    setattr(pipe_or_module, name, inner)
    return pipe_or_module


def refresh_context(
    pipe_or_module: Model,
    num_inference_steps: int | None = None,
    cache_config: DBCacheConfig | None = None,
    verbose: bool = False,
    calibrator_config: CalibratorConfig | None = None,
) -> Model:
    """Let the next call start a new generation, and optionally change the configs. Returns the argument.

    Nothing is compiled unless the new configs change the graph's structure (F, B, the blocks that are never pruned).

    Args:
        pipe_or_module: enabled before.
        num_inference_steps: steps of the coming generation; optional, since generations are found from the timestep.
        cache_config, calibrator_config: new configs, in place of the present ones.
        verbose: print the config that now holds.

    Raises:
        ValueError: if a module was never enabled.
        OptionError: if the structure changes and the module is one that `torch.compile` returned.
    """
    for module in transformers_of(pipe_or_module):
        put_back(unwrapped(module))
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
            options = replace(state.asked, cache=config, calibrator=calibrator_config or state.asked.calibrator)
            if options.structure() == state.asked.structure():
                state.set_options(options)
            elif state is state_of_module(unwrapped(module)):
                compile(unwrapped(module), **{field.name: getattr(options, field.name) for field in fields(Options)})
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


def summary(pipe_or_module: Any, details: bool = False, *, all_sessions: bool = False) -> list[CacheStats]:
    """Statistics of the latest generation, one entry for each region. With DBPrune a chain of blocks has one entry.

    They are those of the present session: of the thread, or of the `session(key)` block. A thread that never called the
    model, such as one that collects metrics, sees the session used last; `CacheStats.session` names it.

    Args:
        pipe_or_module: a pipeline, a module, or the object that `torch.compile` returned.
        details: print the statistics as tables too.
        all_sessions: the latest generation of every session.
    """
    stats: list[CacheStats] = []
    for module in transformers_of(pipe_or_module):
        put_back(unwrapped(module))
        for state in states_of(module):
            present = state.session_to_report()
            entries = [
                entry
                for session in (state.sessions() if all_sessions else [present] if present else [])
                for entry in session.summary()
            ]
            held = sum(session.bytes_held for session in state.sessions())
            kept, renewed = state.hoisted_values()
            stats += [
                replace(entry, bytes_of_all_sessions=held, hoisted_bytes=kept, renewed_inputs=renewed)
                for entry in entries
            ]
    if details:
        from rich import print as rich_print

        from cachedit_fx.report.stats import render

        rich_print(render(stats, details=True) if stats else "no statistics: nothing has run with the cache")
    return stats


def end_session(pipe_or_module: Any, key: Hashable) -> None:
    """Free what the session named `key` stores; an unknown session is ignored."""
    for module in transformers_of(pipe_or_module):
        for state in states_of(module):
            state.end_session(key)


def _without_shell(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself if `torch.compile` was called on it after `enable_cache`; else the argument."""
    inner = unwrapped(module)
    return inner if state_of_module(inner) is not None else module
