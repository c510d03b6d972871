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
from dataclasses import dataclass
from enum import Enum
from typing import Self

from cachedit_fx.options import DBCacheConfig


class Action(Enum):
    """What happens to the blocks in the middle."""

    COMPUTE = "compute"
    REUSE = "reuse"


class Reason(Enum):
    """Why: a short label, what follows from it, and one line for people."""

    action: Action
    explanation: str

    WARMUP = "warm-up", Action.COMPUTE, "one of the first steps (max_warmup_steps, warmup_interval)"
    MASK_COMPUTES = "mask: 1", Action.COMPUTE, "steps_computation_mask has a 1 here"
    MASK_REUSES = "mask: 0", Action.REUSE, "steps_computation_mask has a 0 here and its policy is static"
    MASK_ENDED = "mask ended", Action.COMPUTE, "steps_computation_mask is shorter than the generation"
    MAX_CACHED = "max cached", Action.COMPUTE, "max_cached_steps are cached already"
    MAX_CONTINUOUS = "max in a row", Action.COMPUTE, "max_continuous_cached_steps were cached in a row"
    ACCUMULATED = "accumulated", Action.COMPUTE, "differences reached max_accumulated_residual_diff_threshold"
    THRESHOLD_OFF = "threshold off", Action.COMPUTE, "residual_diff_threshold is zero or less"
    NOTHING_STORED = "nothing stored", Action.COMPUTE, "no step of this generation and branch was computed before"
    SHAPES_DIFFER = "shapes differ", Action.COMPUTE, "what is stored has another shape"
    NOT_FINITE = "not finite", Action.COMPUTE, "the difference is infinite or not a number"
    ABOVE_THRESHOLD = "above", Action.COMPUTE, "the difference is not below residual_diff_threshold"
    BELOW_THRESHOLD = "below", Action.REUSE, "the difference is below residual_diff_threshold"
    BELOW_DYNAMIC = "below dynamic", Action.REUSE, "the difference is below the step's dynamic prune threshold"

    def __new__(cls, label: str, action: Action, explanation: str) -> Self:
        reason = object.__new__(cls)
        reason._value_ = label
        reason.action = action
        reason.explanation = explanation
        return reason


@dataclass(frozen=True)
class Decision:
    """What one step of one CFG branch does. `difference` is the relative L1 one, None where none was measured."""

    action: Action
    reason: Reason
    difference: float | None = None


@dataclass(frozen=True)
class History:
    """What the policy remembers of one CFG branch in one generation."""

    cached: int = 0
    """Cached steps so far."""
    run: int = 0
    """Cached steps since the last computed one."""
    accumulated: float = 0.0
    """Sum of the differences of these."""
    stored: bool = False
    """Whether a computed step left something to reuse."""
    shapes_match: bool = True
    """Whether it has the shapes of the present call."""


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
