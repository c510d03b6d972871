"""Preset: computes by a mask that is made when the generation's number of steps and its guidance are known.

    step 0            computed. Its calls show the CFG branches.
    steps 1, 2, ...   by the mask and calibrator that `schedules.presets.preset(name, steps, guidance)` gives

The number of steps is the setting `steps`, or that of the calling pipeline's scheduler. If neither is known every step
is computed, with a warning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig, LagrangeCalibratorConfig
from cachedit_fx.config.rules import choice, integer, optional, setting
from cachedit_fx.runtime.policies.base import Action, Decision, GenerationFacts, Measure, Reason, Situation, register
from cachedit_fx.runtime.policies.dbcache import DBCache, History
from cachedit_fx.schedules.presets import SHARES, preset

FIRST_STEP = Reason("first step", Action.COMPUTE, "the preset's mask begins with a computed step")
STEPS_UNKNOWN = Reason("steps unknown", Action.COMPUTE, "the preset has no mask without the number of steps")


@dataclass(frozen=True)
class PresetConfig(DBCacheConfig):
    """A preset by name. The number of steps is found when a generation begins."""

    calibrator: ClassVar[CalibratorConfig | None] = LagrangeCalibratorConfig()

    Fn_compute_blocks: int = setting(0, integer(0, "a number of blocks"))
    """F, as for DBCache. Presets predict the model's output, so that nothing else is computed."""
    preset: str = setting("balanced", choice(*SHARES))
    """A name of `cachedit_fx.presets`."""
    steps: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Denoising steps of a generation. None = as the calling pipeline's scheduler tells."""

    @property
    def static(self) -> bool:
        """No difference is ever measured."""
        return True


@register("preset")
class Preset(DBCache):
    """Computes, until the generation's mask is known."""

    config_class: ClassVar[type[DBCacheConfig]] = PresetConfig
    config: PresetConfig

    @property
    def reuses(self) -> bool:
        return True

    def choose(self, facts: GenerationFacts) -> tuple[DBCacheConfig, CalibratorConfig | None] | None:
        config = self.config
        steps = config.num_inference_steps or config.steps or facts.steps
        if steps is None:
            return None
        settings = preset(config.preset, steps, math.inf if facts.guidance is None else facts.guidance)
        return settings["cache_config"], settings["calibrator_config"]

    def decide(self, situation: Situation, history: History, measure: Measure) -> Decision:
        return Decision(Action.COMPUTE, STEPS_UNKNOWN if situation.step else FIRST_STEP)

    def warning(self, decision: Decision) -> str | None:
        if decision.reason is STEPS_UNKNOWN:
            return (
                f"preset={self.config.preset!r}: no scheduler of a pipeline tells the number of steps, so every step "
                "is computed; pass steps=..., as in enable_cache(model, preset='fast', steps=28)"
            )
        return None
