"""What every policy shares: actions, reasons, decisions, what a branch remembers."""

from dataclasses import dataclass
from enum import Enum
from typing import Self


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
