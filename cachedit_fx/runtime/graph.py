"""Makes the callable that the backend returns to dynamo: a graph with regions, or a graph without."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from cachedit_fx.capture import ends_at_break, has_side_effects
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.find_timestep import TimestepSource, timestep_of
from cachedit_fx.passes.gather_inputs import GatheredInputs
from cachedit_fx.passes.graph_aliases import writes_to_inputs
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.passes.insert_attention_forms import AttentionByStep
from cachedit_fx.passes.insert_cache_branch import CacheBranch
from cachedit_fx.passes.insert_cfg_parallel import BatchParallel
from cachedit_fx.passes.insert_low_precision import LowPrecision
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.runtime.agreement import Agreement, Captured
from cachedit_fx.runtime.branches import Branches, branch_obstacle
from cachedit_fx.runtime.call import NO_LOOP, Call, Uncached, current_call
from cachedit_fx.runtime.forms import CallForms
from cachedit_fx.runtime.hoisted_memory import ComputedValues, HoistedCode, HoistedMemory
from cachedit_fx.runtime.hoisting import HoistedValues, StaleValues
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.region import RegionInfo, RegionKey
from cachedit_fx.runtime.region_call import RegionCall
from cachedit_fx.runtime.registry import StateFinder

GRADIENTS = Uncached("gradients wanted", "gradients wanted: nothing is cached under grad mode", is_step=False)

GRADIENTS_ON_RANKS = Uncached(
    GRADIENTS.cause, f"{GRADIENTS.explanation}, and every rank computes the whole model for itself", is_step=False
)


class RewrittenGraph:
    """A graph that was rewritten and lowered.

    Attributes:
        outcome: of the passes; None if they did not run.
        captured: what ranks compare of the graph, if they share its work.
    """

    outcome: Outcome | None = None
    captured: Captured | None = None

    def __init__(self) -> None:
        self._agreements: weakref.WeakKeyDictionary[ModelState, Agreement] = weakref.WeakKeyDictionary()

    @property
    def shares_branches(self) -> bool:
        """Whether ranks compute the branches of guidance apart."""
        return False

    def agreement(self, state: ModelState) -> Agreement | None:
        """What the ranks have compared, of this graph and the state's model; None if they share nothing in it."""
        agreement = self._agreements.get(state)
        if agreement is None and self.captured is not None and state.ranks is not None:
            agreement = Agreement(state.ranks, self.captured, state, self.shares_branches)
            self._agreements[state] = agreement
            state.agreements.add(agreement)
        return agreement


class UncachedGraph(RewrittenGraph):
    """A graph without a region. Its call is counted, and explained once, unless caching is off.

    Args:
        forward: from the graph's inputs to its results.
        finder: from the inputs to the state of their module.
        uncached: the reason why there is no region.
        timestep: the timestep's place in this graph. A later graph of the same call may use the timestep.
        is_fragment: True for a part of a larger forward. Calling a fragment alone is not counted as an uncached call.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        finder: StateFinder,
        uncached: Uncached,
        timestep: TimestepSource | None = None,
        is_fragment: bool = False,
    ) -> None:
        super().__init__()
        self.forward, self.finder, self.uncached = forward, finder, uncached
        self.timestep, self.is_fragment = timestep, is_fragment

    def __call__(self, *inputs: Any) -> Any:
        state = self.finder(inputs)
        agreement = self.agreement(state)
        if agreement is None:
            return self._result(state, inputs)
        with agreement.watch(state):
            agreement.follow(inputs, state.session(), agreement.begin(inputs, state))
            return self._result(state, agreement.taken(inputs))

    def _result(self, state: ModelState, inputs: Sequence[Any]) -> Any:
        if state.config is None or (self.is_fragment and state.session().call is None):
            return self.forward(*inputs)
        with current_call(state) as call:
            call.pass_by(self, self.uncached, timestep_of(self.timestep, inputs))
            return self.forward(*inputs)


class CachedGraph(RewrittenGraph):
    """A graph with regions. It joins a call, and gives the call its timestep.

    Args:
        forward: from a `RegionCall`, and the graph's inputs in one sequence, to its results.
        finder: from the inputs to the state of their module.
        regions: indexed by the numbers that the graph passes to `decide`.
        timestep: the timestep's place in the graph.
        is_whole: False if a break in the capture follows the graph.
        has_side_effects: whether its frame changes attributes or containers besides.
        writes_to_inputs: whether the graph writes to its inputs in place.
        hoisted: the graph's hoisted pieces. `forward` then takes the hoisted values after the inputs, as a sequence.
        copied: places of the inputs that low precision replaces by quantized copies.
        has_forms: whether regions have other forms beside the first.
        branch_obstacle: why ranks cannot compute the branches of guidance apart; None if they can.
        divides_batch: whether ranks compute parts of the batch, so that they decide together.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        finder: StateFinder,
        regions: Sequence[RegionInfo],
        timestep: TimestepSource | None,
        is_whole: bool = True,
        has_side_effects: bool = False,
        writes_to_inputs: bool = False,
        hoisted: HoistedCode | None = None,
        copied: Sequence[int] = (),
        has_forms: bool = False,
        branch_obstacle: str | None = None,
        divides_batch: bool = False,
    ) -> None:
        super().__init__()
        self.forward, self.finder, self.regions, self.timestep = forward, finder, regions, timestep
        self.branch_obstacle, self.divides_batch = branch_obstacle, divides_batch
        self.hoisted, self.copied, self.has_forms = hoisted, copied, has_forms
        self.has_shortcuts = is_whole and not has_side_effects and not writes_to_inputs
        self.values_last = is_whole and not writes_to_inputs
        self._memories: weakref.WeakKeyDictionary[ModelState, HoistedMemory] = weakref.WeakKeyDictionary()
        self._branches: weakref.WeakKeyDictionary[ModelState, Branches] = weakref.WeakKeyDictionary()

    @property
    def shares_branches(self) -> bool:
        """Whether the graph can, and each call is one branch."""
        return self.branch_obstacle is None and not self.divides_batch

    def __call__(self, *inputs: Any) -> Any:
        return self.run(inputs)

    def run(self, inputs: Sequence[Any]) -> Any:
        """The graph's results, from its inputs in order."""
        state = self.finder(inputs)
        agreement = self.agreement(state)
        with current_call(state) as call:
            if agreement is None:
                results = self._called(call, inputs)
            else:
                with agreement.watch(state):
                    results = self._agreed(agreement, call, inputs)
            if call.route is not None and self.has_shortcuts:
                call.route.record(self.run, inputs, results)
            return results

    def _agreed(self, agreement: Agreement, call: Call, inputs: Sequence[Any]) -> Any:
        """The results on a rank that shares the work."""
        is_compared = agreement.begin(inputs, call.session.state, call)
        taken = agreement.taken(inputs)

        def locate() -> None:
            agreement.locate(taken, call, is_compared)

        def enter() -> None:
            nonlocal is_compared
            is_compared = is_compared or agreement.enter(taken, call)
            if call.is_located:  # by a graph before this one, or by a shortcut that was given up
                locate()
            elif call.session.is_stray:  # it has no position
                agreement.follow(taken, call.session, is_compared)

        return self._called(call, taken, enter, [locate])

    def _called(
        self,
        call: Call,
        inputs: Sequence[Any],
        on_enter: Callable[[], None] = lambda: None,
        on_locate: Sequence[Callable[[], None]] = (),
    ) -> Any:
        keys = call.enter(self, self.regions, timestep_of(self.timestep, inputs))
        on_enter()

        def compute() -> Any:
            try:
                return self._results(call, keys, inputs, on_locate)
            except StaleValues:  # raised before a region ran: nothing is stored yet
                return self._results(call, keys, inputs, on_locate)

        if self.divides_batch:
            call.on_success(lambda: _advise(call))
        branches = self._branches_of(call.session.state)
        if branches is None:
            return compute()
        return branches.results(call, inputs, on_locate, compute)

    def _branches_of(self, state: ModelState) -> Branches | None:
        """The branches of guidance that ranks compute apart; None if each rank computes all."""
        if state.grid is None or state.grid.branches is None or not self.shares_branches:
            return None
        branches = self._branches.get(state)
        if branches is None:
            branches = self._branches[state] = Branches(state.grid.branches, state.title)
        return branches

    def _results(
        self,
        call: Call,
        keys: Sequence[RegionKey],
        inputs: Sequence[Any],
        on_locate: Sequence[Callable[[], None]],
    ) -> Any:
        session, notices = call.session, list(on_locate)
        forms = CallForms(call, inputs, self.copied) if self.has_forms else None
        grid = session.state.grid
        ranks = None if grid is None else grid.everyone if self.divides_batch else grid.tokens
        region_call = RegionCall(call, self.regions, keys, self.values_last, notices, forms, ranks)
        if self.hoisted is None:
            return self.forward(region_call, inputs)
        if session.is_stray:  # no generation begins with such a call, so changed weights would not be seen
            return self.forward(region_call, inputs, ComputedValues(self.hoisted, inputs))
        values = HoistedValues(self._memory(self.hoisted, session.state), inputs, call)
        notices.append(values.locate)
        return self.forward(region_call, inputs, values)

    def _memory(self, code: HoistedCode, state: ModelState) -> HoistedMemory:
        memory = self._memories.get(state)
        if memory is None:
            memory = self._memories[state] = HoistedMemory(code, state.options.hoisted_mib * 2**20)
            state.hoisted.add(memory)
        return memory


def _advise(call: Call) -> None:
    """Warn once if ranks cut the batch of calls that are branches already."""
    if call.position is not None and call.position.branch > 0:
        call.session.state.warn_once(
            "cfg_parallel: the ranks cut the batch, and a step calls the model more than once. If each call is one "
            "branch of guidance, passes={'insert_cfg_parallel': False} is faster: each half of the ranks then computes "
            "one of the calls, whole"
        )


def graph_of(
    gm: fx.GraphModule,
    forward: Callable[..., Any],
    finder: StateFinder,
    outcome: Outcome,
    captured: Captured | None = None,
) -> CachedGraph | UncachedGraph:
    """The callable of a graph that was rewritten and lowered.

    Args:
        gm: as dynamo captured it; its writes may have been made pure since.
        forward: lowered.
        outcome: of the passes.
        captured: what ranks compare of the graph, if they share its work.
    """
    graph = _graph_of(gm, forward, finder, outcome.facts, writes_to_inputs(gm.graph))
    graph.outcome, graph.captured = outcome, captured
    return graph


def _graph_of(
    gm: fx.GraphModule, forward: Callable[..., Any], finder: StateFinder, facts: Facts, has_writes: bool
) -> CachedGraph | UncachedGraph:
    timestep, branch, hoisted = facts.get(TimestepSource), facts.get(CacheBranch), facts.get(Hoisted)
    code = HoistedCode(hoisted) if hoisted is not None else None
    if branch is None:
        forward = forward if code is None else _computing(forward, code)
        return UncachedGraph(forward, finder, _why_uncached(facts), timestep, _is_fragment(gm, finder, facts))
    regions = tuple(
        RegionInfo(plan.loops, plan.num_blocks, plan.first, plan.last, plan.loop, plan.block) for plan in branch.regions
    )
    sequence_forward = forward if GatheredInputs in facts else _unpacking(forward, code)
    low = facts.get(LowPrecision)
    copied = () if low is None else low.inputs
    has_forms = low is not None or AttentionByStep in facts
    return CachedGraph(
        sequence_forward,
        finder,
        regions,
        timestep,
        is_whole=not ends_at_break(gm),
        has_side_effects=has_side_effects(),
        writes_to_inputs=has_writes,
        hoisted=code,
        copied=copied,
        has_forms=has_forms,
        divides_batch=BatchParallel in facts,
        branch_obstacle=branch_obstacle(gm, has_writes),
    )


def _unpacking(forward: Callable[..., Any], code: HoistedCode | None) -> Callable[..., Any]:
    """A graph whose inputs are not gathered."""
    taken = () if code is None else code.inputs
    return lambda region_call, inputs, hoisted=(): forward(region_call, *inputs, *(hoisted[index] for index in taken))


def _computing(forward: Callable[..., Any], code: HoistedCode) -> Callable[..., Any]:
    """A graph without a region. It keeps no hoisted values."""

    def computing(*inputs: Any) -> Any:
        hoisted = ComputedValues(code, inputs)
        return forward(*inputs, *(hoisted[index] for index in code.inputs))

    return computing


def _is_fragment(gm: fx.GraphModule, finder: StateFinder, facts: Facts) -> bool:
    """Whether a graph is only a fragment of the compiled module.

    A graph is a fragment if it ended at a graph break. It is one too if it has neither a block loop nor weights, like a
    helper function that dynamo captures as a separate frame.
    """
    detection = facts.get(Detection)
    return ends_at_break(gm) or (finder.anchors is None and (detection is None or not detection.loops))


def _why_uncached(facts: Facts) -> Uncached:
    """The first of the facts that the graph lacks, as a reason."""
    detection, report = facts.get(Detection), facts.get(RegionReport)
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
