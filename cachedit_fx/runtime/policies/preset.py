"""Preset: computes by a mask that is made when the generation's number of steps and its guidance are known.

    step 0            computed. Its calls show the CFG branches.
    steps 1, 2, ...   by the mask and calibrator that `schedules.presets.preset(name, steps, guidance)` gives

The number of steps is the setting `steps`, or that of the calling pipeline's scheduler. If neither is known every step
is computed, with a warning. Settings that the mask replaces, such as a threshold, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import CalibratorConfig, LagrangeCalibratorConfig
from cachedit_fx.config.rules import OptionError, choice, integer, optional, setting
from cachedit_fx.runtime.policies.base import Action, Decision, GenerationFacts, Measure, Reason, Situation, register
from cachedit_fx.runtime.policies.dbcache import DBCache, History
from cachedit_fx.schedules.presets import SHARES, preset

FIRST_STEP = Reason("first step", Action.COMPUTE, "the preset's mask begins with a computed step")
STEPS_UNKNOWN = Reason("steps unknown", Action.COMPUTE, "the preset has no mask without the number of steps")


DECIDED = (
    "residual_diff_threshold",
    "downsample_factor",
    "max_accumulated_residual_diff_threshold",
    "max_warmup_steps",
    "warmup_interval",
    "max_cached_steps",
    "max_continuous_cached_steps",
    "steps_computation_mask",
    "steps_computation_policy",
    "force_refresh_step_hint",
    "force_refresh_step_policy",
)
"""Settings of DBCache that the preset's mask stands for."""


def refuse(names: Iterable[str]) -> None:
    """Raise on settings that a preset decides."""
    decided = [name for name in names if name in DECIDED]
    if decided:
        raise OptionError(
            f"{', '.join(decided)}: a preset decides this by its mask; leave it out, choose another preset "
            f"({', '.join(map(repr, SHARES))}), or pass a cache_config=DBCacheConfig(...) instead of the preset"
        )


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

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(name for name in DECIDED if getattr(self, name) != getattr(DBCacheConfig, name))

    @property
    def expected_steps(self) -> int | None:
        return self.num_inference_steps or self.steps

    def reset(self, **changes: Any) -> Self:
        refuse(changes)
        return super().reset(**changes)

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
        steps = config.expected_steps or facts.steps
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
