"""The whole way on one screen: from dynamo's graph to a callable that reuses the results of earlier steps.

    graph ─► normalize ─► fuse_rotary ─► find_timestep ─► infer_dependence ─► detect_block_loops
          ─► infer_batch_axis ─► insert_cfg_parallel ─► infer_sequence_axes ─► insert_ulysses ─► send_float8
          ─► replace_attention ─► overlap_collectives ─► plan_regions ─► outline_blocks ─► hoist_invariants
          ─► insert_cache_branch ─► gather_inputs ─► insert_low_precision ─► insert_attention_forms
          ─► lower ─► CachedGraph

`torch.compile(model, backend="cachedit", options={...})` finds `cachedit` below through an entry point.
`cachedit_fx.compile` binds `compile_graph` to one module's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cachedit_fx.auto_parallel import chosen
from cachedit_fx.capture import copy_of, guard_storages, kept_results, model_in_frame, numbers_in_frame
from cachedit_fx.config.options import Options, parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.lowering import compile_whole, lower
from cachedit_fx.pass_pipeline import pass_manager
from cachedit_fx.passes.base import NOTHING_KNOWN, Facts, Traced
from cachedit_fx.passes.find_timestep import FindTimestep
from cachedit_fx.passes.graph_aliases import writes_to_inputs
from cachedit_fx.passes.graph_values import is_of_module
from cachedit_fx.passes.insert_low_precision import LowPrecision
from cachedit_fx.passes.insert_ulysses import ContextParallel
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.passes.replace_attention import ReplacedAttention
from cachedit_fx.runtime.agreement import Captured
from cachedit_fx.runtime.clock import guidance
from cachedit_fx.runtime.graph import GRADIENTS, GRADIENTS_ON_RANKS, CachedGraph, UncachedGraph, graph_of
from cachedit_fx.runtime.host_pieces import claim_pieces, mark_weights, refuse_weights
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.presence import leave
from cachedit_fx.runtime.registry import StateFinder, anchors_of
from cachedit_fx.runtime.warning import warn


def cachedit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile`, whose `options` are fields of `cachedit_fx.Options` or, flat, of its `cache`."""
    parsed = parse_options(options, mode=mode)
    if parsed.verify:
        raise OptionError("verify compares with the module, and torch.compile hands a backend graphs: use enable_cache")
    if parsed.time_weights == "host":
        raise OptionError(
            "time_weights='host' moves a module's weights, and torch.compile hands a backend graphs: use enable_cache"
        )
    if parsed.precision is not None:
        raise OptionError(
            "precision keeps copies of a module's weights, and torch.compile hands a backend graphs: use enable_cache"
        )
    if parsed.attention is not None:
        parsed.attention.check(None)
    if parsed.is_alone:
        leave(model_in_frame(), "compiled the model with ulysses_size=1")
    return compile_graph(gm, example_inputs, parsed)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, state: ModelState | None = None
) -> Callable[..., Any]:
    """Rewrite and lower one graph, as dynamo captured it, weights lifted to inputs.

    `state` is that of the one module that the graph is for; None finds the state at each call by the weights.
    """
    anchors = anchors_of(gm, example_inputs)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        refuse_weights(example_inputs, "gradients are wanted")
        timestep = FindTimestep(options.timestep, numbers_in_frame()).run(gm, Facts())
        uncached = GRADIENTS if options.is_alone else GRADIENTS_ON_RANKS
        finder = StateFinder(options, state, anchors)
        return UncachedGraph(compile_whole(gm, example_inputs, options), finder, uncached, timestep)
    guard_storages(gm, example_inputs)
    traced, verifier = (state.traced, state.verifier) if state is not None else (NOTHING_KNOWN, None)
    if state is not None and not options.is_alone:
        traced = replace(traced, is_branch=state.hint().is_branch and guidance()[1])
    choice = state.choice if state is not None else None
    if options.parallel is not None:
        choice = chosen(gm, options, traced)
        options = options if choice is None else choice.applied(options)
        if choice is not None and state is not None:
            state.settle(choice)
    finder = StateFinder(options, state, anchors)
    captured = copy_of(gm) if verifier is not None else gm
    compared = None if options.is_alone else _compared(gm, options)
    if state is not None and state.copies is not None:
        state.copies.mark(gm, example_inputs)
    outcome = rewrite(gm, options, traced)
    if choice is not None:
        outcome.facts.put(choice)
    if state is not None and state.copies is not None:
        low = outcome.facts.get(LowPrecision)
        state.copies.keep(example_inputs, low.inputs if low is not None else ())
    claim_pieces(outcome, example_inputs)
    if state is not None and state.observe is not None:
        state.observe(outcome.facts)
    parallel = outcome.facts.get(ContextParallel)
    if parallel is None and options.ulysses_inputs == "equal" and not options.cfg_parallel:
        compared = None  # no rank needs another one in this graph
    if parallel is not None and parallel.gathers:
        warn(parallel.note)
    attention = outcome.facts.get(ReplacedAttention)
    if attention is not None and attention.warning is not None:
        warn(attention.warning)
    forward = lower(outcome, options) or compile_whole(gm, example_inputs, options)
    if verifier is not None:
        forward = verifier.watch(forward, captured, outcome, lambda: rewrite(copy_of(captured), options, traced))
    if compared is not None:
        compared = replace(compared, plan=_plan(outcome.facts))
    graph = graph_of(gm, forward, finder, outcome, compared)
    if options.cfg_parallel and isinstance(graph, CachedGraph) and not (graph.shares_branches or graph.divides_batch):
        name = model_in_frame() or "the model"
        tell = warn if state is None else state.warn_once
        tell(f"cfg_parallel: every rank computes all branches of {name}: {graph.branch_obstacle}")
    return graph


def _compared(gm: fx.GraphModule, options: Options) -> Captured:
    """What ranks compare of a graph, as dynamo captured it."""
    if options.ulysses_inputs == "first_rank" and writes_to_inputs(
        gm.graph, counts=lambda node: not is_of_module(node)
    ):
        raise OptionError(
            "ulysses_inputs='first_rank' runs the model on copies, and this model writes to its arguments: leave it "
            "out, and give all ranks equal inputs"
        )
    return Captured.of(gm, model_in_frame())


def _plan(facts: Facts) -> dict[str, str]:
    """What must be equal on all ranks of a rewritten graph: the blocks of each region, and the collectives."""
    report, parallel = facts.get(RegionReport), facts.get(ContextParallel)
    regions = report.regions if report is not None else ()
    plan = {region.name: f"{len(region.middle)} of {region.num_blocks} blocks" for region in regions}
    if parallel is not None:
        gathers = sum(parallel.gathers.values())
        plan["the exchange"] = f"{parallel.exchanges} exchanges, {parallel.rings} rings, {gathers} gathers"
    return plan


def rewrite(gm: fx.GraphModule, options: Options, traced: Traced = NOTHING_KNOWN) -> Outcome:
    """Run the passes on `gm`, a graph of the module that `traced` tells of. Nothing is compiled."""
    mark_weights(gm)
    return pass_manager(options, traced.in_frame(numbers_in_frame(), kept_results(gm))).run(gm)
