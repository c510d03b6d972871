"""Explains detection's result for a module: loops, chain, regions, the rewritten graph. No kernel is executed."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cachedit_fx.auto_parallel import ParallelChoice, chosen
from cachedit_fx.backend import compile_graph, rewrite
from cachedit_fx.capture import CAPTURE_ERRORS, capturing, ends_at_break, first_break, isolated_compile, uncompiled
from cachedit_fx.config.options import Options, Verify
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import BlockLoop, Detection
from cachedit_fx.passes.hoist_invariants import Hoisted, HoistedShare
from cachedit_fx.passes.infer_dependence import Dependence, Level
from cachedit_fx.passes.insert_attention_forms import AttentionByStep
from cachedit_fx.passes.insert_cfg_parallel import BatchParallel
from cachedit_fx.passes.insert_low_precision import LowPrecision
from cachedit_fx.passes.insert_ulysses import ContextParallel
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.overlap_collectives import OverlappedCollectives
from cachedit_fx.passes.plan_regions import RegionPlan, RegionReport
from cachedit_fx.passes.replace_attention import ReplacedAttention
from cachedit_fx.runtime.branches import SHARED_CALLS
from cachedit_fx.runtime.compiled_call import CompiledCall
from cachedit_fx.runtime.graph import UncachedGraph
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.registry import states_of, transformers_of, unwrapped


@dataclass(frozen=True)
class Explanation:
    """Detection's result for a module's graphs; `print(explanation)` shows all of it but the code.

    Attributes:
        loops: every block loop, in graph order.
        chain: names of the loops that the hidden states run through.
        regions: the regions that may be bypassed.
        notes: detection's decisions, a sentence each.
        code: the rewritten graphs as Python code.
        work: loop name -> its share of the work of all loops.
        hoisted: names of inputs -> the values that depend on these inputs alone, and are computed apart from the step.
        weights: "sample", "timestep", "conditions" or "weights" -> the share of the weights' elements whose results
            change with it. "weights" is for results that never change. A weight counts for the first of the four that
            its results change with.
        host_bytes: size in bytes of the weights that leave the device with `time_weights="host"`.
        copies: number of weights that have a quantized copy for `precision`, size of the copies, and size of these
            weights, in bytes.
        attention: name of a back end -> how many calls of attention it takes.
        own_attention: why calls keep the model's own attention -> how many. Both are empty without the option
            `attention`.
    """

    loops: tuple[BlockLoop, ...]
    chain: tuple[str, ...]
    regions: tuple[RegionPlan, ...]
    notes: tuple[str, ...]
    code: str
    work: dict[str, float]
    weights: dict[str, float]
    hoisted: dict[tuple[str, ...], HoistedShare]
    host_bytes: int
    copies: tuple[int, int, int] = (0, 0, 0)
    attention: dict[str, int] = field(default_factory=dict)
    own_attention: dict[str, int] = field(default_factory=dict)

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
        if self.weights:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in self.weights.items() if share)
            lines.append(f"Weights, by what their results change with: {shares}")
        if self.hoisted:
            lines.append("Hoisted out of the step, and kept while their inputs stay the same")
        lines.extend(
            f"  {share.values} values of {share.bytes / 2**20:.3g} MiB from {share.weights / 1e6:.3g} M weights change "
            f"with {', '.join(names)}"
            for names, share in self.hoisted.items()
        )
        if self.hoisted:
            lines.append(f'Weights that time_weights="host" takes off the device: {_size(self.host_bytes)}')
        count, size, full = self.copies
        if count:
            lines.append(f"Precision by step keeps copies of {count} weights: {_size(size)} beside their {_size(full)}")
        if self.attention or self.own_attention:
            shares = ", ".join(f"{name} {count}" for name, count in self.attention.items())
            lines.append(f"Calls of attention that back ends take: {shares or 'none'}")
        lines.extend(f"  {count} kept: {reason}" for reason, count in self.own_attention.items())
        lines.extend(f"Note: {note}" for note in self.notes)
        count = self.code.count("\n")
        return "\n".join([*lines, f"The rewritten graph has {count} lines of code: print(explanation.code)"])


def _shape(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _size(size: int) -> str:
    """A size in bytes as text."""
    return f"{size / 2**20:.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.3g} GiB"


class _Captured(Exception):
    """Ends a capture before its graph runs."""


def explain(pipe_or_module: Any, *args: Any, verify: Verify | None = None, **kwargs: Any) -> Explanation:
    """Explain what the passes make of a module.

    Without inputs, `explain(pipe)` is about the graphs that ran last, and captures nothing. With inputs, it captures
    `module(*args, **kwargs)` and runs the passes; no kernel is executed.

    With `verify="first"` the call is also made, by the compiled module and by the plain one, and the results are
    compared. The module stays as it is, compiled or not.

    The options are the module's own if it was compiled, or else the defaults. If the model becomes several graphs,
    all graphs before the last do run, so that the capture goes on. A graph without a chain runs too, since it may be
    one of several.

    Args:
        pipe_or_module: a module, or a pipeline with a single transformer.

    Raises:
        ValueError: if dynamo captures no graph of the module, or, without inputs, if no call was cached yet.
        TypeError: if there is no transformer, or if there are several.
        VerificationError: if the compiled module's result differs from the plain module's.
    """
    module = _the_module(pipe_or_module)
    states = states_of(module)
    if not args and not kwargs:
        return _explanation_of_the_last_call(module, states)
    options = replace(states[0].options if states else Options(), verify=verify)
    traced = Traced.of(module)
    outcomes: list[Outcome] = []

    def stop(*_: Any) -> Any:
        raise _Captured

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if states and states[0].copies is not None:
            states[0].copies.mark(gm, example_inputs)
        choice = chosen(gm, options, traced) if options.parallel is not None else None
        outcomes.append(rewrite(gm, options if choice is None else choice.applied(options), traced))
        choice = choice or (states[0].choice if states else None)
        if choice is not None:
            outcomes[-1].facts.put(choice)
        if states and states[0].copies is not None:
            states[0].copies.keep(example_inputs, ())
        return stop if _has_chain(outcomes[-1]) and not ends_at_break(gm) else gm.forward

    place = None
    with torch.no_grad(), uncompiled(module):
        for flags in (capturing(), contextlib.nullcontext()):  # as `CompiledCall` does
            outcomes.clear()
            with flags, contextlib.suppress(_Captured, *CAPTURE_ERRORS):
                isolated_compile(module, backend)(*args, **kwargs)
            if len(outcomes) == 1 or any(map(_has_chain, outcomes)):
                break
        if len(outcomes) != 1:
            place = first_break(module, args, kwargs)
    if not outcomes:
        raise ValueError(f"{type(module).__name__} could not be captured: it breaks at {place}")
    notes = [f"{len(outcomes)} graphs: the capture breaks, first at {place}"] if place else []
    if verify:
        notes.append(_verified(module, options, traced, args, kwargs))
    return _explanation(outcomes, tuple(notes))


def _the_module(pipe_or_module: Any) -> torch.nn.Module:
    modules = transformers_of(pipe_or_module)
    if len(modules) > 1:
        raise TypeError(f"{type(pipe_or_module).__name__} has {len(modules)} transformers: pass one of them to explain")
    return unwrapped(modules[0])


def _explanation_of_the_last_call(module: torch.nn.Module, states: Sequence[ModelState]) -> Explanation:
    graphs = states[0].latest_graphs if states else []
    outcomes = [graph.outcome for graph in graphs if graph.outcome is not None]
    if not outcomes:
        name = type(module).__name__
        raise ValueError(
            f"no cached call of {name} was made yet: enable the cache and call the model, or pass a call's inputs"
        )
    reasons = [graph.uncached.explanation for graph in graphs if isinstance(graph, UncachedGraph)]
    notes = reasons if len(reasons) == len(graphs) else []
    grid = states[0].grid
    if grid is not None and grid.branches is not None and any(graph.shares_branches for graph in graphs):
        notes.append(SHARED_CALLS)
    return _explanation(outcomes, tuple(notes))


def _verified(
    module: torch.nn.Module, options: Options, traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """A note that one call of the compiled module equals the plain module's."""
    state = ModelState(options)
    state.traced = traced

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, options, state)

    with torch.no_grad():
        CompiledCall(module, backend, state, {})(*args, **kwargs)
    return f"verified: {'equal to' if options.is_exact else 'within rounding of'} the plain module"


def _has_chain(outcome: Outcome) -> bool:
    detection = outcome.facts.get(Detection)
    return detection is not None and bool(detection.chain)


def _shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Name of a level -> its share of the weights of all graphs."""
    dependences = [each for outcome in outcomes if (each := outcome.facts.get(Dependence)) is not None]
    names = {Level.SAMPLE: "sample", Level.TIME: "timestep", Level.CONDITIONS: "conditions", Level.WEIGHTS: "weights"}
    total = sum(sum(dependence.weights.values()) for dependence in dependences)
    if not total:
        return {}
    return {name: sum(each.weights[level] for each in dependences) / total for level, name in names.items()}


def _hoisted(outcomes: Sequence[Outcome]) -> dict[tuple[str, ...], HoistedShare]:
    """Names of inputs -> the values of all graphs that depend on them."""
    shares: dict[tuple[str, ...], HoistedShare] = {}
    for outcome in outcomes:
        hoisted = outcome.facts.get(Hoisted)
        for names, share in hoisted.by_inputs().items() if hoisted is not None else ():
            before = shares.get(names, HoistedShare(0, 0, 0))
            shares[names] = HoistedShare(*map(operator.add, before, share))
    return shares


def _host_bytes(outcomes: Sequence[Outcome]) -> int:
    """Size in bytes of the weights that may lie on the host. They may if the call is one graph."""
    hoisted = outcomes[0].facts.get(Hoisted) if len(outcomes) == 1 else None
    return hoisted.time_bytes if hoisted is not None else 0


def _copies(outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    """Number of weights of all graphs that have a quantized copy, bytes of the copies, and bytes of these weights."""
    facts = [low for outcome in outcomes if (low := outcome.facts.get(LowPrecision)) is not None]
    columns = zip(*((len(low.inputs), low.bytes, low.weight_bytes) for low in facts), strict=True)
    count, size, full = map(sum, columns) if facts else (0, 0, 0)
    return count, size, full


OUTSIDE = "it is outside the middle blocks, and attention is chosen by step"


def _attention(outcomes: Sequence[Outcome]) -> tuple[dict[str, int], dict[str, int]]:
    """The calls of all graphs that back ends take, by their names, and those that do not, by their reasons."""
    taken: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for outcome in outcomes:
        replaced, by_step = outcome.facts.get(ReplacedAttention), outcome.facts.get(AttentionByStep)
        if replaced is None:
            continue
        calls = replaced.calls if not replaced.is_by_step else by_step.calls if by_step is not None else {}
        taken.update(calls)
        kept.update(replaced.kept)
        kept[OUTSIDE] += sum(replaced.calls.values()) - sum(calls.values())
    return dict(taken), dict(+kept)


def _explanation(outcomes: Sequence[Outcome], notes: tuple[str, ...]) -> Explanation:
    detections = [detection for outcome in outcomes if (detection := outcome.facts.get(Detection)) is not None]
    reports = [report for outcome in outcomes if (report := outcome.facts.get(RegionReport)) is not None]
    loops = tuple(itertools.chain.from_iterable(detection.loops for detection in detections))
    total = max(sum(loop.cost for loop in loops), 1)
    remarks = {
        note: None for detection in detections if detection.loops or len(outcomes) == 1 for note in detection.notes
    }
    remarks |= {refusal: None for report in reports for refusal in report.refusals}
    for outcome in outcomes:
        facts = outcome.facts
        choice = facts.get(ParallelChoice)
        remarks |= dict.fromkeys(choice.notes) if choice is not None else {}
        shared = facts.get(BatchParallel), facts.get(ContextParallel), facts.get(OverlappedCollectives)
        remarks |= {fact.note: None for fact in shared if fact is not None}
    attention, own_attention = _attention(outcomes)
    return Explanation(
        loops=loops,
        chain=tuple(loop.name for detection in detections for loop in detection.chain_loops),
        regions=tuple(itertools.chain.from_iterable(report.regions for report in reports)),
        notes=(*notes, *remarks),
        code="\n".join(outcome.graph_module.print_readable(print_output=False) for outcome in outcomes),
        work={loop.name: loop.cost / total for loop in loops},
        weights=_shares(outcomes),
        hoisted=_hoisted(outcomes),
        host_bytes=_host_bytes(outcomes),
        copies=_copies(outcomes),
        attention=attention,
        own_attention=own_attention,
    )
