"""The whole story on one screen: from dynamo's graph to a callable that reuses what earlier steps computed.

    dynamo graph ─► normalize ─► find_timestep ─► detect_block_loops ─► plan_regions ─► outline_blocks
                                                       ─► insert_cache_branch ─► gather_inputs ─► lower ─► CachedGraph

`torch.compile(model, backend="cachedit", options={...})` finds `cachedit` below through an entry point;
`cachedit_fx.compile` binds the same function to one module's cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from cachedit_fx.capture import ends_at_break, numbers_in_frame
from cachedit_fx.config.options import Options, parse_options
from cachedit_fx.lowering import compile_whole, lower
from cachedit_fx.passes.base import NOTHING_KNOWN, ModuleFacts, Pass, facts
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.find_timestep import FindTimestep
from cachedit_fx.passes.gather_inputs import GatherInputs
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.manager import PassManager
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import Cut, PlanRegions
from cachedit_fx.runtime.graph import GRADIENTS, CachedGraph, UncachedGraph, is_fragment, unpacking, why_uncached
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.region import RegionInfo
from cachedit_fx.runtime.registry import StateFinder, anchors_of

logger = logging.getLogger(__name__)


def cachedit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. Keywords are `torch.compile`'s; see `cachedit_fx.options.Options` for what `options` may hold."""
    return compile_graph(gm, example_inputs, parse_options(options, mode=mode))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, cache: ModelState | None = None
) -> Callable[..., Any]:
    """Rewrite and lower one graph.

    Args:
        gm: as dynamo captured it, weights lifted to inputs.
        example_inputs: the real inputs of the call that is being compiled.
        options: validated.
        cache: the cache of the one module this graph is for; None finds it at each call by the weights.
    """
    find = StateFinder(options, cache, anchors_of(gm, example_inputs))
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return UncachedGraph(compile_whole(gm, example_inputs, options), find, GRADIENTS)
    outer = rewrite(gm, options, numbers_in_frame(), cache.module if cache is not None else NOTHING_KNOWN)
    found = dict(facts(outer))
    outer.meta.clear()  # what the passes learned refers to the flat graph, and would keep it alive
    if found.get("pieces"):
        distinct = lower(outer, options)
        logger.info("%d pieces, %d distinct", len(found["pieces"]), distinct)
        _LazyGraphModule.force_recompile(outer)
        forward = outer.forward
    else:
        forward = compile_whole(gm, example_inputs, options)
    timestep = found.get("timestep")
    if "cache_input" in found:
        planned = found["regions"].regions
        regions = tuple(RegionInfo(r.loops, r.num_blocks, r.first, r.last, r.loop, r.block) for r in planned)
        if "gathered_inputs" not in found:
            forward = unpacking(forward)
        return CachedGraph(forward, find, regions, timestep, not ends_at_break(gm))
    return UncachedGraph(forward, find, why_uncached(found), timestep, is_fragment(gm, find, found))


def pipeline(options: Options, numbers: Mapping[str, Any], module: ModuleFacts = NOTHING_KNOWN) -> list[Pass]:
    """The passes in order, options bound. See `rewrite`."""
    shared, *of_loops = [Cut(*config.structure()) for config, _ in options.policies] or [Cut(0, 0)]
    return [
        Normalize(),
        FindTimestep(options.timestep, numbers),
        DetectBlockLoops(options.loops, module=module),
        PlanRegions(shared.first, shared.last, options.scope, shared.non_prune, of_loops, options.predicts_output),
        OutlineBlocks(options.granularity, canonical_layout=options.inner_backend != "eager"),
        InsertCacheBranch(),
        GatherInputs(),
    ]


def pass_manager(
    options: Options, numbers: Mapping[str, Any] | None = None, module: ModuleFacts = NOTHING_KNOWN
) -> PassManager:
    """The passes, switched on and off as the options say.

    `passes={"name": False}` switches one off, `passes=["name", ...]` every one that is not listed. A pass that lacks
    what another would have provided is skipped.

    Raises:
        PassOrderError: on a name that is no pass.
    """
    passes = pipeline(options, numbers or {}, module)
    given = options.passes
    if given is None:
        switches = {}
    elif all(isinstance(item, str) for item in given):
        switches = {str(name): True for name in given} | {item.name: item.name in given for item in passes}
    else:
        switches = dict(item for item in given if isinstance(item, tuple))
    if options.cache is None:
        switches |= {PlanRegions.name: False, InsertCacheBranch.name: False}
    return PassManager(passes, switches)


def rewrite(
    gm: fx.GraphModule, options: Options, numbers: Mapping[str, Any], module: ModuleFacts = NOTHING_KNOWN
) -> fx.GraphModule:
    """Run the passes on `gm`; what they learned is in the result's facts. Nothing is compiled.

    Args:
        numbers: arguments of the traced frame that are Python numbers, by name.
        module: what is known of the module that the graph is, or is a part of.
    """
    return pass_manager(options, numbers, module).run(gm)
