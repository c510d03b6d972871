"""Which groups of layers are quantized, and by which kind: plans from the error that each group makes alone.

errors of single groups  ->  steps, from the least error for a saved byte to the most  ->  a plan after each step

The errors of groups are taken to add as squares, as independent errors do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """A group of layers in one kind.

    Attributes:
        group: its name, such as `blocks.0.attn`.
        kind: of quantization.
        layers: their whole names.
        error: squared error of the model's output over its square, if this group alone is quantized.
        saved: bytes.
    """

    group: str
    kind: str
    layers: tuple[str, ...]
    error: float
    saved: int


@dataclass(frozen=True)
class Plan:
    """Groups that are quantized: at most one candidate a group."""

    candidates: tuple[Candidate, ...] = field(default=())

    @property
    def error(self) -> float:
        """Squared error of the output over its square, as the sum of the groups' errors."""
        return math.fsum(candidate.error for candidate in self.candidates)

    @property
    def saved(self) -> int:
        """Bytes."""
        return sum(candidate.saved for candidate in self.candidates)

    @property
    def kinds(self) -> dict[str, str]:
        """Layer -> kind, of the layers that are quantized."""
        return {layer: candidate.kind for candidate in self.candidates for layer in candidate.layers}

    def per_layer(self, candidates: Iterable[Candidate]) -> dict[str, str | None]:
        """The argument of `quantize`, in which the other layers of `candidates` are kept, whatever its `quant_type`."""
        kept = {layer: None for candidate in candidates for layer in candidate.layers}
        return kept | self.kinds

    def replaced(self, candidate: Candidate) -> Plan:
        """The plan with this candidate for its group."""
        return Plan((*(each for each in self.candidates if each.group != candidate.group), candidate))


def greedy_plans(candidates: Sequence[Candidate]) -> list[Plan]:
    """Plans from none of the groups to all of them. Each next one takes the step of least error for a saved byte.

    A step quantizes a group, or gives it a kind that saves more. Kinds that another one, or two others mixed, beat in
    error and bytes are in no plan.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.group].append(candidate)
    steps = sorted((step for options in groups.values() for step in _steps(options)), key=lambda step: step[0])
    plans = [Plan()]
    for _, candidate in steps:
        plans.append(plans[-1].replaced(candidate))
    return plans


def _steps(options: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
    """(error for a byte, candidate) along the lower convex hull of a group's errors over its saved bytes."""
    steps: list[tuple[float, Candidate]] = []
    error, saved = 0.0, 0
    while better := [option for option in options if option.saved > saved]:
        slopes = [((option.error - error) / (option.saved - saved), option) for option in better]
        step = min(slopes, key=lambda step: (step[0], -step[1].saved))
        steps.append(step)
        error, saved = step[1].error, step[1].saved
    return steps


def plan_in_order(candidates: Iterable[Candidate], most_saved: int) -> Plan:
    """The candidates in this order, without those that would bring the saved bytes above `most_saved`.

    A later candidate of a group takes the place of an earlier one.
    """
    plan = Plan()
    for candidate in candidates:
        larger = plan.replaced(candidate)
        if larger.saved <= most_saved:
            plan = larger
    return plan
