"""Chooses the form of a region at each step, and puts quantized copies of weights among a graph's inputs.

options.precision, options.attention ──► (), (low), (attention), (attention, low) ──► the region's form of these
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.steps import ChosenSteps, StepFacts
from cachedit_fx.passes.region_forms import ATTENTION, LOW
from cachedit_fx.runtime.policies.base import context_start
from cachedit_fx.runtime.region import RegionKey

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call


Region: TypeAlias = Callable[..., tuple[Any, ...]]
Forms: TypeAlias = Sequence[tuple[tuple[str, ...], Region]]
"""The forms of a region beside its first one, each with the sorted names of what it differs from that one in."""


class CallForms:
    """Chooses the form of each region of one graph in one call.

    Args:
        call: the transformer call.
        inputs: of the graph, in order.
        places: of the inputs that have a copy.
    """

    def __init__(self, call: Call, inputs: Sequence[Any], places: Sequence[int]) -> None:
        self.call, self.inputs, self.places = call, inputs, places
        self._names: frozenset[str] | None = None

    def choose(self, forms: Forms, key: RegionKey, config: DBCacheConfig) -> tuple[tuple[str, ...], Region | None]:
        """What the region's form of this step differs in, and the form; None if it is the first one.

        Args:
            forms: of the region.
            key: of the region.
            config: of the region's policy.
        """
        if self._names is None:
            self._names = self._chosen(self._facts(key, config))
        differences = {name for names, _ in forms for name in names}
        wanted = tuple(sorted(self._names & differences))
        return wanted, next((form for names, form in forms if names == wanted), None)

    def inputs_of(self, names: Collection[str], values: Sequence[Any]) -> Sequence[Any]:
        """The inputs of a region's form: in low precision with copies of weights in place.

        Args:
            names: what the form differs in.
            values: the region's inputs, among them the graph's inputs as one sequence.
        """
        return [self._low if value is self.inputs else value for value in values] if LOW in names else values

    def _chosen(self, facts: StepFacts) -> frozenset[str]:
        """What the step's forms differ in from the first ones, if the regions have such forms."""
        options = self.call.session.state.options
        precision, attention = options.precision, options.attention
        names = set()
        if precision is not None:
            self._warn_of_last_steps("full", precision.full_steps, facts)
            names |= {LOW} if not precision.is_full(facts) and self._low is not None else set()
        if attention is not None and attention.is_by_step:
            self._warn_of_last_steps("own", attention.own_steps, facts)
            names |= {ATTENTION} if not attention.is_own(facts) else set()
        return frozenset(names)

    def _warn_of_last_steps(self, prefix: str, chosen: ChosenSteps, facts: StepFacts) -> None:
        if chosen.last and facts.steps is None:
            self.call.session.state.warn_once(
                f"{prefix}_last_steps has no effect here: no scheduler tells the number of steps; pass "
                f"num_inference_steps, or {prefix}_steps_mask in place of {prefix}_last_steps"
            )

    def _facts(self, key: RegionKey, config: DBCacheConfig) -> StepFacts:
        """What is known of the present step."""
        assert self.call.position is not None
        session, (_, step, branch) = self.call.session, self.call.position
        stats = session.stats.get(key.chain)
        computed = 0 if stats is None else stats.branch(branch).executed_steps - len(stats.branch(branch).cached_steps)
        base = session.state.config
        steps = (base.expected_steps if base is not None else None) or session.facts(step, self.call.tick).steps
        return StepFacts(step, steps, computed, _reuses(config, step, steps))

    @cached_property
    def _low(self) -> list[Any] | None:
        """The graph's inputs with copies in place; None if a weight has none any more."""
        session = self.call.session
        weights = session.state.copies
        if weights is None:
            return None
        weights.check(session)
        copies = weights.of(self.inputs, self.places)
        if len(copies) < len(self.places):
            session.state.warn_once(
                "a step runs in full precision, since its weights are not those of the layers that were chosen: call "
                "disable_cache, then enable_cache, to choose layers anew"
            )
            return None
        low = list(self.inputs)
        for place, copy in copies.items():
            low[place] = copy
        return low


def _reuses(config: DBCacheConfig, step: int, steps: int | None) -> int | None:
    """Steps after `step` that a static mask reuses, up to the next computed one; None without such a mask.

    After a forced refresh the mask counts from 0 again, and its first step computes.
    """
    mask = config.steps_computation_mask if config.static else None
    if mask is None:
        return None
    for later in itertools.count(step + 1):
        place = later - context_start(config, later)
        if later == steps or place == 0 or place >= len(mask) or mask[place]:
            break
    return later - step - 1
