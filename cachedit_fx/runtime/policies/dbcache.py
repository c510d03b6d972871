"""DBCache: the middle of the chain is bypassed as a whole if the first blocks' residual has hardly moved.

The first rule that matches wins:

    1  warm-up step                               compute   WARMUP
    2  mask: one / past its end / static zero     compute / compute / reuse   MASK_COMPUTES / MASK_ENDED / MASK_REUSES
    3  enough cached steps in this generation     compute   MAX_CACHED
    4  enough cached steps in a row               compute   MAX_CONTINUOUS
    5  differences since the last computed step   compute   ACCUMULATED
    6  threshold off, nothing to reuse            compute   THRESHOLD_OFF, NOTHING_STORED, SHAPES_DIFFER
    7  difference below the threshold?            compute or reuse   NOT_FINITE, ABOVE_THRESHOLD, BELOW_THRESHOLD

With a mask, rule 1 is left out: the mask's leading ones are the warm-up. A static zero reuses at any limits and
threshold. It cannot reuse missing values, so rule 6's last two reasons come first.

The accumulated difference of rule 5 is the sum over the cached steps since the last computed one. It bounds the drift
of the stored values. The present step's own difference is not in the sum that decides about the step, since rule 5
comes before measuring. cache-dit 1.5.3 never resets the sum: once the sum reaches the limit there, the rest of the
generation is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.policies.base import Action, Decision, Measure, Policy, Reason, Situation, Stored, register

_MISSING = {Stored.NOTHING: Reason.NOTHING_STORED, Stored.OTHER_SHAPES: Reason.SHAPES_DIFFER, Stored.FITS: None}


@dataclass(frozen=True)
class History:
    """DBCache's history of one chain in one CFG branch."""

    cached: int = 0
    """Cached steps so far."""
    run: int = 0
    """Cached steps since the last computed one."""
    accumulated: float = 0.0
    """Sum of the differences of the cached steps since the last computed one."""


@register("dbcache")
class DBCache(Policy[DBCacheConfig, History]):
    """Decides about the middle as a whole."""

    config_class: ClassVar[type[DBCacheConfig]] = DBCacheConfig

    def start(self) -> History:
        return History()

    def decide(self, situation: Situation, history: History, measure: Measure) -> Decision:
        return decide(self.config, situation, history, measure)

    def advance(self, history: History, situation: Situation, decision: Decision) -> History:
        if decision.action is Action.COMPUTE:
            return History(cached=history.cached)
        return History(history.cached + 1, history.run + 1, history.accumulated + (decision.difference or 0.0))

    def warning(self, decision: Decision) -> str | None:
        return warning(self.config, decision)


def decide(config: DBCacheConfig, situation: Situation, history: History, measure: Measure) -> Decision:
    """Apply the rules above to the counts and the sum in `history`."""
    reason = _reason_without_difference(config, situation, history)
    if reason is not None:
        return Decision(reason.action, reason)
    difference = measure()
    if not math.isfinite(difference):
        reason = Reason.NOT_FINITE
    elif difference < config.residual_diff_threshold:
        reason = Reason.BELOW_THRESHOLD
    else:
        reason = Reason.ABOVE_THRESHOLD
    return Decision(reason.action, reason, difference)


def _reason_without_difference(config: DBCacheConfig, situation: Situation, history: History) -> Reason | None:
    step, mask, missing = situation.step, config.steps_computation_mask, _MISSING[situation.stored]
    if mask is None:
        if step < config.max_warmup_steps and step % config.warmup_interval == 0:
            return Reason.WARMUP
    elif step >= len(mask):
        return Reason.MASK_ENDED
    elif mask[step]:
        return Reason.MASK_COMPUTES
    elif config.static:
        return missing or Reason.MASK_REUSES

    if 0 <= config.max_cached_steps <= history.cached:
        return Reason.MAX_CACHED
    if 0 <= config.max_continuous_cached_steps <= history.run:
        return Reason.MAX_CONTINUOUS
    limit = config.max_accumulated_residual_diff_threshold
    if limit is not None and history.accumulated >= limit:
        return Reason.ACCUMULATED
    if config.residual_diff_threshold <= 0:
        return Reason.THRESHOLD_OFF
    return missing


def warning(config: DBCacheConfig, decision: Decision) -> str | None:
    """A warning if the difference was not finite, or if the mask was too short; otherwise None."""
    if decision.reason is Reason.NOT_FINITE:
        return "a difference is infinite or not a number: such steps are computed"
    if decision.reason is Reason.MASK_ENDED:
        digits = len(config.steps_computation_mask or ())
        return f"steps_computation_mask has {digits} digits; steps past its end are computed"
    return None
