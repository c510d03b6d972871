"""Makes the recommended configurations, from careful to fast: one rule in the number of steps.

Each preset computes a share of the steps whole, and predicts the model's output at the others, which run nothing of the
model: `LagrangeCalibratorConfig()` with a static mask. docs/choosing.md has their costs and results, measured by
`cachedit bench`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import LagrangeCalibratorConfig
from cachedit_fx.config.rules import OptionError, nearest

SHARES: Mapping[str, float] = MappingProxyType({"careful": 0.5, "balanced": 0.43, "fast": 0.33, "fastest": 0.25})
"""Preset -> the share of the steps that is computed, rounded down to whole steps."""
MIN_STEPS = 8
"""Fewest steps of a generation with which the presets beat, in measurements, as many plain steps as they compute."""
MIN_COMPUTED = 4
"""Fewest steps that any preset computes."""


def presets(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> keyword arguments of `enable_cache`, for generations of `steps` denoising steps; the most careful first.

        enable_cache(pipe, **presets(steps=28)["fast"])        # the same: enable_cache(pipe, preset="fast", steps=28)

    Raises:
        OptionError: below `MIN_STEPS`. With so few steps, taking fewer steps is better than any known caching.
    """
    if steps < MIN_STEPS:
        raise OptionError(
            f"presets(steps={steps!r}): they are for generations of {MIN_STEPS} steps and more. With so few, taking "
            "one step less gives a better picture than predicting one"
        )
    return {name: _settings(steps, share) for name, share in SHARES.items()}


def preset(name: str, steps: int) -> dict[str, Any]:
    """The keyword arguments of one preset.

    Raises:
        OptionError: on an unknown name, with the nearest known one.
    """
    if name not in SHARES:
        raise OptionError(
            f"preset={name!r} is not allowed: it must be one of {', '.join(map(repr, SHARES))}; "
            f"did you mean {nearest(str(name), SHARES)!r}?"
        )
    return presets(steps)[name]


def _settings(steps: int, share: float) -> dict[str, Any]:
    config = DBCacheConfig(
        Fn_compute_blocks=0,
        steps_computation_mask=spread_mask(steps, max(MIN_COMPUTED, int(steps * share))),
        steps_computation_policy="static",
    )
    return {"cache_config": config, "calibrator_config": LagrangeCalibratorConfig()}


def spread_mask(steps: int, computed: int) -> list[int]:
    """A mask of `steps` digits, `computed` of them ones: consecutive at the start, then evenly spread to the last step.

    The start is a third of the computed steps, or as many as leave the others at most 3 steps apart, whichever is
    fewer. Early steps move least smoothly under guidance, and a prediction needs values to start from. If no start is
    left, all ones are spread evenly.

    Args:
        steps: at least 2.
        computed: 2 to `steps`.
    """
    start = max(1, min(computed // 3, (3 * computed - steps) // 2))
    rest = computed - start
    ones = {start - 1 + round((steps - start) * index / rest) for index in range(1, rest + 1)}
    return [int(step < start or step in ones) for step in range(steps)]
