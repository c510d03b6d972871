"""Chooses the precision of a call, and puts quantized copies of weights among a graph's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.precision import StepFacts
from cachedit_fx.runtime.policies.base import context_start
from cachedit_fx.runtime.region import RegionKey

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call


class CallPrecision:
    """The precision of one graph in one call.

    Args:
        call: the transformer call.
        inputs: of the graph, in order.
        places: of the inputs that have a copy.
    """

    def __init__(self, call: Call, inputs: Sequence[Any], places: Sequence[int]) -> None:
        self.call, self.inputs, self.places = call, inputs, places
        self._is_full: bool | None = None

    def low_inputs(self, values: Sequence[Any], key: RegionKey, config: DBCacheConfig) -> list[Any] | None:
        """A region's inputs with copies of weights in place; None if the step runs in full precision.

        Args:
            values: the region's inputs, among them the graph's inputs as one sequence.
            key: of the region.
            config: of the region's policy.
        """
        if self._is_full is None:
            precision, facts = self.call.session.state.options.precision, self._facts(key, config)
            self._is_full = precision is None or precision.is_full(facts)
            if precision is not None and precision.full_last_steps and facts.steps is None:
                self.call.session.state.warn_once(
                    "full_last_steps has no effect here: no scheduler tells the number of steps; pass "
                    "num_inference_steps, or full_steps_mask in place of full_last_steps"
                )
        if self._is_full or self._low is None:
            return None
        return [self._low if value is self.inputs else value for value in values]

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
