"""Defines the policy of precision: which steps run the middle blocks with full weights, and which with quantized ones.

step 0 1 2 3 4 5 6 7
     f f . . . . . f        PrecisionConfig("int8", full_first_steps=2, full_last_steps=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cachedit_fx.config.patterns import patterns_of
from cachedit_fx.config.rules import reject_unknown
from cachedit_fx.config.steps import ChosenSteps, StepFacts
from cachedit_fx.quantization.layers import Request
from cachedit_fx.quantization.selection import request_of


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
        self.full_steps  # noqa: B018 - raises on what is not allowed, as the request does
        for name in ("exclude", "include"):
            object.__setattr__(self, name, patterns_of(name, getattr(self, name)))
        self.request  # noqa: B018

    @cached_property
    def full_steps(self) -> ChosenSteps:
        """The steps that run in full precision."""
        return ChosenSteps.of(self, "full")

    @cached_property
    def request(self) -> Request:
        """The layers that get copies."""
        return request_of(self.quant_type, self.exclude, self.include, self.per_layer)

    def structure(self) -> PrecisionConfig:
        """The settings that shape the graph: the copies. The steps are read at each call."""
        return PrecisionConfig(self.quant_type, exclude=self.exclude, include=self.include, per_layer=self.per_layer)

    def is_full(self, facts: StepFacts) -> bool:
        """Whether a step that computes the middle blocks runs them in full precision. Pure, called once for a step."""
        return self.full_steps.holds(facts)


def as_precision(value: Any) -> Any:
    """The config of a kind's name, or of a mapping of settings. Other values stay as they are."""
    if isinstance(value, str):
        return PrecisionConfig(value)
    if isinstance(value, Mapping):
        reject_unknown(value, dict.fromkeys(PrecisionConfig.__dataclass_fields__, "cachedit_fx.PrecisionConfig"))
        return PrecisionConfig(**value)
    return value
