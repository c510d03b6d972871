"""Defines the rule by which a config chooses steps: at both ends of a generation, and by a mask.

step   0 1 2 3 4 5 6 7
       x x . . . . . x      first=2, last=1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cachedit_fx.config.rules import MASK, as_mask, check, integer, optional

_RULES = {
    "first_steps": integer(0, "a number of steps"),
    "last_steps": integer(0, "a number of steps"),
    "steps_mask": optional(MASK),
}


class StepFacts(NamedTuple):
    """What is known of a step of one CFG branch before it is computed."""

    step: int
    """Its number in the generation, from 0."""
    steps: int | None = None
    """Number of steps of the generation; None if neither the cache's config nor a scheduler tells it."""
    computed: int = 0
    """Steps of the generation that were computed before this one."""
    reuses: int | None = None
    """Steps after this one that a static mask reuses, up to the next computed one; None without such a mask."""


@dataclass(frozen=True)
class ChosenSteps:
    """Steps of a generation, by their numbers.

    Attributes:
        first: how many at the start.
        last: how many at the end. They are not chosen while nothing tells the number of steps.
        mask: a digit for each step: 1 = chosen. Steps beyond it are as its last digit. None chooses none.
    """

    first: int = 0
    last: int = 0
    mask: Sequence[int] | None = None

    @classmethod
    def of(cls, config: Any, prefix: str) -> ChosenSteps:
        """The steps in the fields `<prefix>_first_steps`, `<prefix>_last_steps` and `<prefix>_steps_mask`.

        A mask is stored in the config in its one form.

        Raises:
            OptionError: on a value that is not allowed.
        """
        mask = f"{prefix}_steps_mask"
        object.__setattr__(config, mask, as_mask(getattr(config, mask)))
        for name, rule in _RULES.items():
            check(f"{prefix}_{name}", getattr(config, f"{prefix}_{name}"), rule)
        return cls(*(getattr(config, f"{prefix}_{name}") for name in _RULES))

    def __bool__(self) -> bool:
        """Whether a step can be chosen at all."""
        return bool(self.first or self.last or (self.mask is not None and any(self.mask)))

    def holds(self, facts: StepFacts) -> bool:
        """Whether a step is one of them."""
        return (
            facts.step < self.first
            or (facts.steps is not None and facts.step >= facts.steps - self.last)
            or (self.mask is not None and bool(self.mask[min(facts.step, len(self.mask) - 1)]))
        )
