"""Whether a step computes the blocks in the middle or reuses what an earlier step stored: a pure function.

    (config, step, history of the CFG branch, difference) ──► Decision(action, reason, difference)
    (history, decision)                                   ──► the branch's history before its next step

The first rule that matches wins:

    1  warm-up step                               compute   WARMUP
    2  mask: one / past its end / static zero     compute / compute / reuse   MASK_COMPUTES / MASK_ENDED / MASK_REUSES
    3  enough cached steps in this generation     compute   MAX_CACHED
    4  enough cached steps in a row               compute   MAX_CONTINUOUS
    5  differences since the last computed step   compute   ACCUMULATED
    6  threshold off, nothing to reuse            compute   THRESHOLD_OFF, NOTHING_STORED, SHAPES_DIFFER
    7  difference below the threshold?            compute or reuse   NOT_FINITE, ABOVE_THRESHOLD, BELOW_THRESHOLD

With a mask there is no other warm-up than its leading ones: rule 1 is left out. A static zero reuses whatever the
limits and the threshold say, but cannot reuse what is not there: rule 6's last two reasons come first.

The accumulated difference of rule 5 is the sum over the cached steps since the last computed one: a bound on how far
the stored values may have drifted. cache-dit 1.5.3 never resets the sum, so that there, once it has tripped, the rest
of the generation is computed. The present step's own difference is not in the sum that decides about it: rule 5 comes
before measuring.
"""

import math
from collections.abc import Callable

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.policies.base import Action, Decision, History, Reason


def context_start(config: DBCacheConfig, step: int) -> int:
    """The step from which `step` of a generation is counted: where all that was stored was last forgotten on purpose
    (`force_refresh_step_hint`)."""
    hint = config.force_refresh_step_hint
    if hint is None or step < hint:
        return 0
    return step // hint * hint if config.force_refresh_step_policy == "repeat" else hint


def decide(config: DBCacheConfig, step: int, history: History, difference: Callable[[], float]) -> Decision:
    """Decide about step number `step` (from 0) of a generation, or of its part since `context_start`.

    `difference` is called at most once, and only if no rule decides without it: on a GPU it waits for the device.
    """
    reason = _reason_without_difference(config, step, history)
    if reason is not None:
        return Decision(reason.action, reason)
    measured = difference()
    if not math.isfinite(measured):
        reason = Reason.NOT_FINITE
    elif measured < config.residual_diff_threshold:
        reason = Reason.BELOW_THRESHOLD
    else:
        reason = Reason.ABOVE_THRESHOLD
    return Decision(reason.action, reason, measured)


def _reason_without_difference(config: DBCacheConfig, step: int, history: History) -> Reason | None:
    mask = config.steps_computation_mask
    missing = None
    if not history.stored:
        missing = Reason.NOTHING_STORED
    elif not history.shapes_match:
        missing = Reason.SHAPES_DIFFER

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


def advance(history: History, decision: Decision) -> History:
    """The branch's history after the step: computing stores anew and ends the run; reusing lengthens it."""
    if decision.action is Action.COMPUTE:
        return History(cached=history.cached, stored=True)
    accumulated = history.accumulated + (decision.difference or 0.0)
    return History(history.cached + 1, history.run + 1, accumulated, history.stored)
