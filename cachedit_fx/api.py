"""What a user calls: compile a module, enable a pipeline, read what happened."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args

import torch
from rich.console import Console
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cachedit_fx.backend import compile_graph, ends_at_break, pass_manager, rewrite
from cachedit_fx.compiled_call import CompiledCall, Guards, capturing, first_break
from cachedit_fx.options import CalibratorConfig, DBCacheConfig, OptionError, Options, ParamsModifier, parse_options
from cachedit_fx.passes.base import facts
from cachedit_fx.passes.detect_block_loops import BlockLoop, Detection, ModuleFacts
from cachedit_fx.passes.plan_regions import RegionPlan, RegionReport
from cachedit_fx.presets import preset as preset_settings
from cachedit_fx.runtime.listener import listen, stop_listening
from cachedit_fx.runtime.registry import cache_of_module, caches_of_weights, register, unregister
from cachedit_fx.runtime.state import ModelCache
from cachedit_fx.runtime.stats import CacheStats, render

logger = logging.getLogger(__name__)

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
        **options: any field of `cachedit_fx.options.Options` or, flat, of its `cache`; and `fullgraph`, `dynamic`,
            `recompile_limit` (64 unless given), `mode` as in `torch.compile`. The first three hold until they are given
            again, and so does `guards`: "always" passes dynamo's guards at every call, "generation" at the first two
            calls of a kind in each generation only, which is safe as long as nothing about the module but the contents
            of its weights changes between two steps of one generation (no adapter set or scaled, no processor
            exchanged).

    Raises:
        OptionError: on an unknown or invalid option, before anything is compiled.
    """
    own = ("fullgraph", "dynamic", "recompile_limit")
    given: dict[str, Any] = {name: options.pop(name) for name in own if name in options}
    guards: Guards | None = options.pop("guards", None)
    if guards not in (None, *get_args(Guards)):
        raise OptionError(f"guards={guards!r}: expected {' or '.join(map(repr, get_args(Guards)))}")
    parsed = parse_options(options)
    _check_against(module, parsed)
    known, compiled = cache_of_module(module), module._compiled_call_impl
    before = compiled if isinstance(compiled, CompiledCall) else None
    kept = before.torch_options if before else {}
    torch_options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, **kept, **given}
    guards = guards or (before.guards if before else "always")
    if known and before and torch_options == kept and known.options.structure() == parsed.structure():
        before.guards = guards
        known.set_policy(parsed)
        return module
    cache = ModelCache(parsed)
    cache.module = ModuleFacts.of(module)
    listener = listen(module)
    if listener is not None:
        cache.hint = listener.hint

    owned = weakref.ref(cache)  # by the module's call: dynamo keeps a backend for good, and the cache holds buffers

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        cache = owned()
        assert cache is not None
        return compile_graph(gm, example_inputs, cache.options, cache)

    module._compiled_call_impl = CompiledCall(module, backend, cache, torch_options, guards)
    register(module, cache)
    return module


def _check_against(module: torch.nn.Module, options: Options) -> None:
    """Raise now on names that would otherwise fail, or do nothing, in the middle of a compilation."""
    pass_manager(options)
    parameters = inspect.signature(module.forward).parameters
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
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
        module = _unwrap(module)
        if cache_of_module(module) is not None:
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
        caches = [cache for cache in _caches(module) if cache.config is not None]
        if not caches:
            raise ValueError(
                f"{type(_unwrap(module)).__name__} has no cache to refresh: call enable_cache first; a model that "
                "torch.compile(backend='cachedit') returned has one from its first call on"
            )
        for cache in caches:
            config = cache_config or cache.config or DBCacheConfig()
            if num_inference_steps is not None:
                config = config.reset(num_inference_steps=num_inference_steps)
            options = replace(cache.options, cache=config, calibrator=calibrator_config or cache.options.calibrator)
            if options.structure() == cache.options.structure():
                cache.set_policy(options)
            elif cache is cache_of_module(_unwrap(module)):
                compile(_unwrap(module), **{item.name: getattr(options, item.name) for item in fields(Options)})
            else:
                raise OptionError(
                    "Fn_compute_blocks, Bn_compute_blocks, non_prune_block_ids, the class of the config and whether "
                    "the model's output is predicted shape the compiled graph: call torch.compile again to change "
                    "them, or use cachedit_fx.compile, which does so by itself"
                )
            if verbose:
                Console().print(config)
    return pipe_or_module


def summary(pipe_or_module: Any, details: bool = False) -> list[CacheStats]:
    """Statistics of the latest generation, one entry for each region; with `details` they are printed as tables.
    With DBPrune a chain of blocks has one entry.

    Accepts a pipeline, a module, or what `torch.compile` returned.
    """
    found: list[CacheStats] = []
    for module in transformers_of(pipe_or_module):
        for cache in _caches(module):
            if cache.latest is not None:
                found.extend(cache.latest.summary())
    if details:
        Console().print(render(found, details=True) if found else "no statistics: nothing has run with the cache")
    return found


@dataclass(frozen=True)
class Explanation:
    """What detection found in a module's graph; `print(explanation)` tells it all, `.code` is the rewritten graph."""

    loops: tuple[BlockLoop, ...]
    chain: tuple[str, ...]
    regions: tuple[RegionPlan, ...]
    notes: tuple[str, ...]
    code: str
    work: dict[str, float]

    def __str__(self) -> str:
        lines = ["Block loops" if self.loops else "Block loops: none"]
        for loop in self.loops:
            streams = ", ".join(f"{c.name} {_shape(c.shape)} {str(c.dtype)[6:]}" for c in loop.carried)
            role = "chain" if loop.name in self.chain else "prologue"
            lines.append(
                f"  {loop.name}: {loop.num_blocks} blocks ({role}, found by {loop.evidence}, "
                f"{self.work[loop.name]:.0%} of the work)"
            )
            lines.append(f"    carried: {streams}")
            lines.append(
                f"    invariant: {len(loop.invariant)}, per block: {len(loop.per_block)}, skips: {len(loop.skips)}"
            )
        lines.append("Regions" if self.regions else "Regions: none, so calls run uncached")
        for region in self.regions:
            whole = sum(not continued for continued in region.continued)
            middle = f"blocks {region.first} to {region.num_blocks - region.last - 1}"
            lines.append(
                f"  {region.name}: {middle if region.block is None else f'block {region.block}'} of "
                f"{region.num_blocks} may be bypassed; {len(region.live_outs)} results of "
                f"{region.result_bytes / 2**20:.3g} MiB in all, {whole} stored whole"
            )
        lines.extend(f"Note: {note}" for note in self.notes)
        return "\n".join([*lines, "", "Rewritten graph", self.code])


def _shape(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


class _Captured(Exception):
    """Ends a capture whose graph is not to run."""


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Capture `module(*args, **kwargs)`, run the passes, and say what they found. No kernel is executed.

    Options are those that the module was compiled with, else the defaults. Where the model is several graphs, all but
    the last do run, to get there; so does a graph without a chain, which may be one of several.
    """
    module = _unwrap(module)
    caches = _caches(module)
    options = caches[0].options if caches else Options()
    known = ModuleFacts.of(module)
    graphs: list[fx.GraphModule] = []

    def stop(*_: Any) -> Any:
        raise _Captured

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outer = rewrite(gm, options, {}, known)
        graphs.append(outer)
        whole = not ends_at_break(gm) and facts(outer)["block_loops"].chain
        return stop if whole else gm.forward

    place = None
    with torch.no_grad(), uncompiled(module):
        for flags in (capturing(), contextlib.nullcontext()):  # as `CompiledCall` does
            graphs.clear()
            with flags, contextlib.suppress(_Captured, GuardOnDataDependentSymNode):
                isolated: dict[str, Any] = {"isolate_recompiles": True}  # missing from torch 2.13's overloads
                torch.compile(module, backend=backend, **isolated)(*args, **kwargs)
            if len(graphs) == 1 or any(facts(graph)["block_loops"].chain for graph in graphs):
                break
        if len(graphs) != 1:
            place = first_break(module, args, kwargs)
    if not graphs:
        raise ValueError(f"{type(module).__name__} could not be captured: it breaks at {place}")
    notes = (f"{len(graphs)} graphs: the capture breaks, first at {place}",) if place else ()
    return _explanation(graphs, notes)


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Take the compiled call off the module for a while."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _explanation(graphs: Sequence[fx.GraphModule], notes: tuple[str, ...]) -> Explanation:
    found = [facts(graph) for graph in graphs]
    detections: list[Detection] = [item["block_loops"] for item in found]
    reports: list[RegionReport] = [item.get("regions") or RegionReport((), ()) for item in found]
    loops = tuple(itertools.chain.from_iterable(detection.loops for detection in detections))
    total = max(sum(loop.cost for loop in loops), 1)
    told = {note: None for detection in detections if detection.loops or len(graphs) == 1 for note in detection.notes}
    told |= {refusal: None for report in reports for refusal in report.refusals}
    return Explanation(
        loops=loops,
        chain=tuple(loop.name for detection in detections for loop in detection.chain_loops),
        regions=tuple(itertools.chain.from_iterable(report.regions for report in reports)),
        notes=(*notes, *told),
        code="\n".join(graph.print_readable(print_output=False) for graph in graphs),
        work={loop.name: loop.cost / total for loop in loops},
    )


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
    return _unwrap(module) is not module


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    inner = module._modules.get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else module


def _caches(module: torch.nn.Module) -> list[ModelCache]:
    """The caches of a module, the one used last ahead."""
    inner = _unwrap(module)
    known = cache_of_module(inner)
    if known is not None:
        return [known]
    return sorted(caches_of_weights(inner.parameters()), key=lambda cache: cache.used, reverse=True)
