"""Which blocks a step prunes (DBPrune): pure functions, on top of `runtime.policy`, which decides about one block.

    (chain's history, step)                           ──► the history as it stands when the step begins
    (config, history, block's own history, difference) ──► Decision about the block
    (history, decision)                               ──► the history before the step's next block

What counts steps (warm-up, mask, limits on cached steps) goes by the chain's history as it was when the step began, so
that all blocks of a step are treated alike. What is about stored values (nothing stored, shapes, the accumulated
difference) goes by the block's own: each was computed last at a step of its own. cache-dit 1.5.3 counts a step as soon
as one of its blocks was pruned, so that `max_cached_steps` there cuts off in the middle of a step.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from cachedit_fx.config.cache import DBPruneConfig
from cachedit_fx.runtime.policies.base import Action, Decision, History, Reason
from cachedit_fx.runtime.policies.dbcache import decide

SAMPLE = 5
"""Differences of a step, the first ones, that a dynamic threshold is made of."""


@dataclass(frozen=True)
class PruneHistory:
    """What the policy remembers of one chain of blocks, in one CFG branch and generation."""

    pruned_steps: int = 0
    """Steps ahead of the present one in which a block was pruned."""
    run: int = 0
    """Of these, those since the last step that computed every block."""
    step: int = -1
    """The present step."""
    prunes: bool = False
    """Whether a block of the present step was pruned."""
    differences: tuple[float, ...] = ()
    """The first positive differences of the present step, at most `SAMPLE`."""

    def at(self, step: int) -> PruneHistory:
        """As it stands at `step`: the same within a step, the finished step counted where another one begins."""
        if step == self.step:
            return self
        if self.prunes:
            return PruneHistory(self.pruned_steps + 1, self.run + 1, step)
        return PruneHistory(self.pruned_steps, 0, step)

    def after(self, decision: Decision) -> PruneHistory:
        """Behind a block of the present step."""
        found, value = self.differences, decision.difference
        if value is not None and 0 < value < math.inf and len(found) < SAMPLE:
            found = (*found, value)
        return replace(self, prunes=self.prunes or decision.action is Action.REUSE, differences=found)


def decide_block(
    config: DBPruneConfig, chain: PruneHistory, block: History, difference: Callable[[], float]
) -> Decision:
    """Decide about a block, the next one of step `chain.step`.

    Of the block's own history the counts of steps are not used. `difference` is called at most once, as in `decide`.
    """
    decision = decide(config, chain.step, replace(block, cached=chain.pruned_steps, run=chain.run), difference)
    if decision.reason is not Reason.ABOVE_THRESHOLD or decision.difference is None:
        return decision
    if decision.difference >= dynamic_threshold(config, chain.differences):
        return decision
    return replace(decision, action=Action.REUSE, reason=Reason.BELOW_DYNAMIC)


def dynamic_threshold(config: DBPruneConfig, differences: Sequence[float]) -> float:
    """The threshold that holds behind these positive differences of a step.

    mean(differences) x relax ratio, where that lies between `residual_diff_threshold` and the highest allowed, both
    excluded; `residual_diff_threshold` otherwise. A block's own difference has no part in it.
    """
    lowest, highest = config.residual_diff_threshold, config.max_dynamic_prune_threshold
    if not config.enable_dynamic_prune_threshold or not differences:
        return lowest
    relaxed = statistics.fmean(differences) * config.dynamic_prune_threshold_relax_ratio
    return relaxed if lowest < relaxed < (2 * lowest if highest is None else highest) else lowest


def step_decision(blocks: Collection[Decision]) -> Decision:
    """A step in short: reuse if any block was pruned, the commonest reason for that, the mean finite difference.

    One decision is its own summary. `blocks` is not empty.
    """
    if len(blocks) == 1:
        return next(iter(blocks))
    pruned = [decision for decision in blocks if decision.action is Action.REUSE]
    ((reason, _),) = Counter(decision.reason for decision in pruned or blocks).most_common(1)
    values = [d.difference for d in blocks if d.difference is not None and math.isfinite(d.difference)]
    return Decision(reason.action, reason, statistics.fmean(values) if values else None)
