"""The whole story on one screen: from dynamo's graph to a callable that reuses what earlier steps computed.

    dynamo graph ─► normalize ─► find_timestep ─► detect_block_loops ─► plan_regions ─► outline_blocks
                                                       ─► insert_cache_branch ─► gather_inputs ─► lower ─► CachedGraph

`torch.compile(model, backend="cachedit", options={...})` finds `cachedit` below through an entry point;
`cachedit_fx.compile` binds the same function to one module's cache.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from cachedit_fx.lowering import inner_compiler, lower
from cachedit_fx.options import Options, parse_options
from cachedit_fx.passes.base import Pass, facts
from cachedit_fx.passes.detect_block_loops import NOTHING_KNOWN, DetectBlockLoops, Detection, ModuleFacts
from cachedit_fx.passes.find_timestep import FindTimestep, TimestepSource, timestep_of
from cachedit_fx.passes.gather_inputs import GatherInputs
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.manager import PassManager
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import Cut, PlanRegions, RegionReport
from cachedit_fx.runtime.call import NO_LOOP, RegionInfo, Uncached, call_of
from cachedit_fx.runtime.registry import cache_of_anchors
from cachedit_fx.runtime.state import ModelCache

logger = logging.getLogger(__name__)

Anchors: TypeAlias = tuple[int, int]
"""Indices of the two inputs by which a call's module is found."""

GRADIENTS = Uncached("gradients wanted", "gradients wanted: nothing is cached under grad mode")


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
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, cache: ModelCache | None = None
) -> Callable[..., Any]:
    """Rewrite and lower one graph.

    Args:
        gm: as dynamo captured it, weights lifted to inputs.
        example_inputs: the real inputs of the call that is being compiled.
        options: validated.
        cache: the cache of the one module this graph is for; None finds it at each call by the weights.
    """
    find = CacheFinder(options, cache, _anchors(gm, example_inputs))
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return UncachedGraph(_compile_whole(gm, example_inputs, options), find, GRADIENTS)
    outer = rewrite(gm, options, _numbers_in_frame(), cache.module if cache is not None else NOTHING_KNOWN)
    found = dict(facts(outer))
    outer.meta.clear()  # what the passes learned refers to the flat graph, and would keep it alive
    if found.get("pieces"):
        distinct = lower(outer, options)
        logger.info("%d pieces, %d distinct", len(found["pieces"]), distinct)
        _LazyGraphModule.force_recompile(outer)
        forward = outer.forward
    else:
        forward = _compile_whole(gm, example_inputs, options)
    timestep = found.get("timestep")
    if "cache_input" in found:
        planned = found["regions"].regions
        regions = tuple(RegionInfo(r.loops, r.num_blocks, r.first, r.last, r.loop, r.block) for r in planned)
        if "gathered_inputs" not in found:
            forward = _unpacking(forward)
        return CachedGraph(forward, find, regions, timestep, not ends_at_break(gm))
    return UncachedGraph(forward, find, _why_uncached(found), timestep, _is_fragment(gm, find, found))


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


class CacheFinder:
    """From a call's inputs to the cache of its module, which is held weakly: dynamo keeps compiled code for good."""

    def __init__(self, options: Options, cache: ModelCache | None, anchors: Anchors | None) -> None:
        self.options, self.anchors = options, anchors
        self.own = weakref.ref(cache) if cache is not None else None
        self.nobodys = ModelCache(options) if cache is None and anchors is None else None

    def __call__(self, args: Sequence[Any]) -> ModelCache:
        found = self.own() if self.own is not None else self.nobodys
        if found is not None:
            return found
        assert self.anchors is not None
        block, last = self.anchors
        return cache_of_anchors(args[block], args[last], self.options)


class UncachedGraph:
    """A graph without a region. Where that was not asked for, its call is counted, and said once why.

    Args:
        timestep: where this graph has it; a later graph of the same call may go by it.
        is_fragment: it is clearly not a model of its own; called by itself, it is no call that could be cached.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        find: CacheFinder,
        why: Uncached,
        timestep: TimestepSource | None = None,
        is_fragment: bool = False,
    ) -> None:
        self.forward, self.find, self.why = forward, find, why
        self.timestep, self.is_fragment = timestep, is_fragment

    def __call__(self, *args: Any) -> Any:
        cache = self.find(args)
        if cache.config is None or (self.is_fragment and cache.session().call is None):
            return self.forward(*args)
        with call_of(cache) as call:
            call.pass_by(self.why, timestep_of(self.timestep, args))
            return self.forward(*args)


class CachedGraph:
    """A graph with regions: has its part in a call, with the timestep that the call goes by.

    Args:
        forward: of the call's side of the graph (`GraphCall`), and the graph's inputs in one sequence.
        is_whole: nothing breaks the capture behind it.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        find: CacheFinder,
        regions: Sequence[RegionInfo],
        timestep: TimestepSource | None,
        is_whole: bool = True,
    ) -> None:
        self.forward, self.find, self.regions, self.timestep = forward, find, regions, timestep
        self.is_whole = is_whole

    def __call__(self, *args: Any) -> Any:
        return self.run(args)

    def run(self, inputs: Sequence[Any]) -> Any:
        """The graph's results, from its inputs in order."""
        with call_of(self.find(inputs)) as call:
            part = call.enter(self.regions, timestep_of(self.timestep, inputs))
            results = self.forward(part, inputs)
            if call.ran is not None and self.is_whole:
                call.ran.append((self.run, inputs, results))
            return results


def _unpacking(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda cache, inputs: forward(cache, *inputs)


def _anchors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Anchors | None:
    """Which inputs tell modules apart: the last weight in a numbered member of a container, and the last of all."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [index for index, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)]
    if not weights:
        return None
    in_blocks = [index for index in weights if re.search(r"_\d+_(modules|parameters)_", names[index])]
    return (in_blocks or weights)[-1], weights[-1]


def ends_at_break(gm: fx.GraphModule) -> bool:
    """Whether more graphs of the same call follow, since something broke the capture behind this one."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def _is_fragment(gm: fx.GraphModule, find: CacheFinder, found: Mapping[str, Any]) -> bool:
    """Whether a graph is only a part of what the user compiled: it ended at a graph break, or it has neither a block
    loop nor weights, as a helper function has that is a frame of its own."""
    if ends_at_break(gm):
        return True
    detection: Detection | None = found.get("block_loops")
    return find.anchors is None and (detection is None or not detection.loops)


def _compile_whole(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The graph as it is, in one piece, from the inner compiler."""
    return gm.forward if options.inner_backend == "eager" else inner_compiler(options)(gm, list(example_inputs))


def _why_uncached(found: Mapping[str, Any]) -> Uncached:
    """What was looked for and not found."""
    detection: Detection | None = found.get("block_loops")
    report: RegionReport | None = found.get("regions")
    if detection is not None and not detection.loops:
        return Uncached(
            NO_LOOP,
            "no caching: no block loop was found, that is, no run of two or more alike sub-graphs of at least four "
            "operations in which each takes what the one before it made; cachedit_fx.explain(module, ...) shows more",
        )
    if detection is not None and not detection.chain:
        return Uncached(NO_LOOP, f"no caching: {'; '.join(detection.notes)}")
    if report is not None and report.refusals:
        return Uncached("no region to bypass", "no caching: " + "; ".join(report.refusals))
    return Uncached("switched off", "no caching: a pass that it needs is switched off by the option `passes`")


def _numbers_in_frame() -> dict[str, float]:
    """Arguments of the frame being traced that are Python numbers: dynamo makes them constants of its first graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx.f_locals
    except (AttributeError, AssertionError):
        return {}
    named = dict(frame) | (frame["kwargs"] if isinstance(frame.get("kwargs"), dict) else {})
    return {k: float(v) for k, v in named.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
