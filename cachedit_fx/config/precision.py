"""Defines the policy of precision: which steps run the middle blocks with full weights, and which with quantized ones.

step 0 1 2 3 4 5 6 7
     f f . . . . . f        PrecisionConfig("int8", full_first_steps=2, full_last_steps=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from cachedit_fx.config.rules import MASK, as_mask, check, integer, optional, reject_unknown
from cachedit_fx.quantization.layers import Request
from cachedit_fx.quantization.selection import patterns_of, request_of

_STEPS = integer(0, "a number of steps")
_MASK = optional(MASK)


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
class PrecisionConfig:
    """Precision by step: quantized copies of weights in the middle blocks, and the steps that leave them aside.

    A step that computes the middle takes the copies, unless `is_full` says that it runs in full precision. The first F
    and the last B blocks always run in full precision, so differences between steps compare like with like. The module
    keeps its weights, and a changed weight gets a new copy.

    A subclass may choose the steps by another rule: it overrides `is_full`.

    Raises:
        OptionError: on an unknown kind, or a value that is not allowed.
    """

    quant_type: Any = field(default="int8", hash=False)
    """The kind of the copies: a name, or a configuration of torchao, as for `cachedit_fx.quantize`."""
    full_first_steps: int = 0
    """Steps at the start of a generation that run in full precision."""
    full_last_steps: int = 0
    """Steps at the end that run in full precision. It has no effect if nothing tells the number of steps:
    `num_inference_steps`, a preset's `steps` or a pipeline's scheduler."""
    full_steps_mask: Sequence[int] | None = None
    """One digit for each step: 1 = full precision. Steps beyond the mask have the precision of its last digit."""
    exclude: str | Sequence[str] = ()
    """Patterns of layers that get no copy, as for `cachedit_fx.quantize`."""
    include: str | Sequence[str] = ()
    """Patterns of layers that get a copy though the default choice leaves them out."""
    per_layer: Mapping[str, Any] | None = field(default=None, hash=False)
    """Pattern -> another kind; None = no copy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_steps_mask", as_mask(self.full_steps_mask))
        for name, rule in (("full_first_steps", _STEPS), ("full_last_steps", _STEPS), ("full_steps_mask", _MASK)):
            check(name, getattr(self, name), rule)
        for name in ("exclude", "include"):
            object.__setattr__(self, name, patterns_of(name, getattr(self, name)))
        self.request  # noqa: B018 - raises on what is not allowed

    @cached_property
    def request(self) -> Request:
        """The layers that get copies."""
        return request_of(self.quant_type, self.exclude, self.include, self.per_layer)

    def structure(self) -> PrecisionConfig:
        """The settings that shape the graph: the copies. The steps are read at each call."""
        return PrecisionConfig(self.quant_type, exclude=self.exclude, include=self.include, per_layer=self.per_layer)

    def is_full(self, facts: StepFacts) -> bool:
        """Whether a step that computes the middle blocks runs them in full precision. Pure, called once for a step."""
        mask, steps = self.full_steps_mask, facts.steps
        return (
            facts.step < self.full_first_steps
            or (steps is not None and facts.step >= steps - self.full_last_steps)
            or (mask is not None and bool(mask[min(facts.step, len(mask) - 1)]))
        )


def as_precision(value: Any) -> Any:
    """The config of a kind's name, or of a mapping of settings. Other values stay as they are."""
    if isinstance(value, str):
        return PrecisionConfig(value)
    if isinstance(value, Mapping):
        reject_unknown(value, dict.fromkeys(PrecisionConfig.__dataclass_fields__, "cachedit_fx.PrecisionConfig"))
        return PrecisionConfig(**value)
    return value
