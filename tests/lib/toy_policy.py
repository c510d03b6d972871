"""A policy in one file: every n-th step computes, by whole regions or by single blocks in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cachedit_fx.config.cache import DBCacheConfig, Unit
from cachedit_fx.config.rules import integer, setting
from cachedit_fx.runtime.policies.base import Action, Decision, Measure, Policy, Reason, Situation, Stored, register

DUE = Reason("due", Action.COMPUTE, "the period has passed")
NOT_DUE = Reason("not due", Action.REUSE, "the period has not passed")


@dataclass(frozen=True)
class EveryNthConfig(DBCacheConfig):
    """Every `period`-th step computes."""

    period: int = setting(2, integer(1, "a number of steps"))
    """Steps from one computed step to the next."""


@register("every_nth")
class EveryNth(Policy[EveryNthConfig, int]):
    """Its history is the number of decisions so far."""

    config_class: ClassVar[type[DBCacheConfig]] = EveryNthConfig

    def start(self) -> int:
        return 0

    def decide(self, situation: Situation, history: int, measure: Measure) -> Decision:
        turn = situation.step + (situation.block or 0)
        due = turn % self.config.period == 0 or situation.stored is not Stored.FITS
        reason = DUE if due else NOT_DUE
        return Decision(reason.action, reason)

    def advance(self, history: int, situation: Situation, decision: Decision) -> int:
        return history + 1


@dataclass(frozen=True)
class TurnsConfig(EveryNthConfig):
    """The same, with blocks taking turns."""

    unit: ClassVar[Unit] = "block"


@register("turns")
class Turns(EveryNth):
    """Each block computes every `period`-th step, at a step of its own."""

    config_class: ClassVar[type[DBCacheConfig]] = TurnsConfig
