"""Chooses the precision of a call, and puts quantized copies of weights among a graph's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.precision import StepFacts
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
                    "full_last_steps has no effect here: no scheduler tells the number of steps; pass full_steps_mask"
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
        mask = config.steps_computation_mask if config.static else None
        rest = [] if mask is None else list(mask[step + 1 :])
        reuses = None if mask is None else rest.index(1) if 1 in rest else len(rest)
        return StepFacts(step, session.facts(step, self.call.tick).steps, computed, reuses)

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
                "a step runs in full precision, since its weights are not those of the module's layers: call "
                "enable_cache again after layers were replaced"
            )
            return None
        low = list(self.inputs)
        for place, copy in copies.items():
            low[place] = copy
        return low
