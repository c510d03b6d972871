"""Makes the recommended configurations, from careful to fast: one rule in the number of steps and the guidance.

Each preset computes a share of the steps whole, and predicts the model's output at the others, which run nothing of the
model: `LagrangeCalibratorConfig` with a static mask. docs/choosing.md has their costs and results, measured by
`cachedit bench`.

    stiffness = (guidance - 1) / computed steps

    guidance   mask          order                      share of the error made up for
    1          spread_mask   1                          1
    above      graded_mask   1 below `LINEAR`, else 0   1 up to `PAID[0]`, then less, 0 from `PAID[1]` on

The computed steps are a coarse integration of the sampler's path: two predictions and a correction are a multistep
method. A method looks back further for accuracy and is stable in shorter steps for it: a corrected line is third order
with a stable range of 0.55, a corrected repetition second order with 1, a repetition first order with 2. Guidance
multiplies the pull of the model on a wrong state, hence the stiffness, and so chooses among the three.

Guided outputs jump after the first step, at pure noise, and settle within a tenth of the path. Errors made there
are most of a picture's error. So `graded_mask` computes densely there, less so if less is made up for later. From
`PAID[1]` on the mask is even and outputs are repeated, which is sampling with fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.calibrators import LagrangeCalibratorConfig
from cachedit_fx.config.rules import OptionError, Rule, check, integer, is_number, nearest, optional

SHARES: Mapping[str, float] = MappingProxyType({"careful": 0.5, "balanced": 0.43, "fast": 0.33, "fastest": 0.25})
"""Preset -> the share of the steps that is computed, rounded down to whole steps."""
MIN_STEPS = 8
"""Fewest steps of a generation with which the presets beat, in measurements, as many plain steps as they compute."""
MIN_COMPUTED = 4
"""Fewest steps that any preset computes."""
LINEAR = 0.07
"""Stiffness from which on outputs are repeated, not continued on a line."""
PAID = (0.29, 0.57)
"""Stiffness up to which the whole error of the predictions is made up for, and from which on nothing of it is."""
START_DENSITY, START_LENGTH = 4.0, 0.1
"""Of `graded_mask`: the density of computed steps at the start, above that at the end, and the share of the path over
which this excess falls to 1 / e."""


def presets(steps: int, guidance: float | None = 1.0) -> dict[str, dict[str, Any]]:
    """Name -> keyword arguments of `enable_cache`, for generations of `steps` denoising steps; the most careful first.

        enable_cache(pipe, **presets(steps=28)["fast"])        # the same: enable_cache(pipe, preset="fast", steps=28)

    Below `MIN_STEPS` every step is computed: taking fewer steps is then better than any known caching.

    Args:
        steps: at least 1.
        guidance: the scale between the two branches of a step (`true_cfg_scale`). 1 or None if there is one branch; a
            scale that the model takes as an input (`guidance`) is none in this sense.

    Raises:
        OptionError: if `steps` is not a number of steps, or `guidance` no number.
    """
    return {name: preset(name, steps, guidance) for name in SHARES}


def preset(name: str, steps: int, guidance: float | None = 1.0) -> dict[str, Any]:
    """The keyword arguments of one preset; see `presets`.

    Raises:
        OptionError: on an unknown name, with the nearest known one. Also if `steps` is not a number of steps, or
            `guidance` no number.
    """
    if name not in SHARES:
        raise OptionError(
            f"preset={name!r} is not allowed: it must be one of {', '.join(map(repr, SHARES))}; "
            f"did you mean {nearest(str(name), SHARES)!r}?"
        )
    check("steps", steps, integer(1, "denoising steps of a generation"))
    check("guidance", guidance, optional(Rule(is_number, "a number (1 = one branch)")))
    computed = max(MIN_COMPUTED, int(steps * SHARES[name])) if steps >= MIN_STEPS else steps
    excess = 0.0 if guidance is None else abs(guidance - 1)
    calibrator = calibrator_for(excess / computed)
    share = calibrator.deferred_correction
    config = DBCacheConfig(
        Fn_compute_blocks=0,
        steps_computation_mask=graded_mask(steps, computed, share) if excess else spread_mask(steps, computed),
        steps_computation_policy="static",
    )
    return {"cache_config": config, "calibrator_config": calibrator}


def calibrator_for(stiffness: float) -> LagrangeCalibratorConfig:
    """The calibrator for a stiffness, as the module's header defines it."""
    share = (PAID[1] - stiffness) / (PAID[1] - PAID[0])
    return LagrangeCalibratorConfig(
        lagrange_order=int(stiffness < LINEAR), deferred_correction=min(max(share, 0.0), 1.0)
    )


def spread_mask(steps: int, computed: int) -> list[int]:
    """A mask of `steps` digits, `computed` of them ones: consecutive at the start, then evenly spread to the last step.

    The start is a third of the computed steps, or as many as leave the others at most 3 steps apart, whichever is
    fewer. A prediction needs values to start from. If no start is left, all ones are spread evenly.

    Args:
        steps: at least 1.
        computed: 1 to `steps`.
    """
    start = max(1, min(computed // 3, (3 * computed - steps) // 2))
    rest = computed - start
    ones = {start - 1 + round((steps - start) * index / rest) for index in range(1, rest + 1)}
    return [int(step < start or step in ones) for step in range(steps)]


def graded_mask(steps: int, computed: int, grade: float) -> list[int]:
    """A mask of `steps` digits, `computed` of them ones: dense at the start, with gaps that grow to the end.

    The density of ones falls from `1 + grade * START_DENSITY` to 1 over the path. The ones divide the path into parts
    of equal weight, each from a computed step to the next one. The last part, up to the end, has `1 - grade / 2` of
    that weight.

    Args:
        steps: at least 1.
        computed: 1 to `steps`.
        grade: 0 to 1. At 0 the ones are where a sampler of `computed` steps has its steps.
    """

    def weight(step: int) -> float:
        place = step / steps
        return place + grade * START_DENSITY * START_LENGTH * (1 - math.exp(-place / START_LENGTH))

    ones: list[int] = []
    for index in range(computed):
        target = weight(steps) * index / (computed - grade / 2)
        step = min(range(steps), key=lambda candidate: abs(weight(candidate) - target))
        ones.append(max(step, ones[-1] + 1) if ones else step)
    return [int(step in ones) for step in range(steps)]
