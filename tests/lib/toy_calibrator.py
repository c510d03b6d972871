"""A calibrator in one file: the mean of the latest values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.rules import integer, setting
from cachedit_fx.runtime.calibrators import Calibrator, Moment, register_calibrator


@dataclass(frozen=True)
class MeanConfig(CalibratorConfig):
    """The mean of the latest computed values."""

    values: int = setting(2, integer(1, "a number of values"))
    """Values that the mean is taken of."""


def coefficients(config: MeanConfig, trail: Sequence[Moment], now: Moment) -> tuple[float, ...]:
    """Equal weights."""
    count = sum(moment.computed for moment in trail)
    return (1 / count,) * count


register_calibrator("mean", Calibrator(MeanConfig, lambda config: config.values, coefficients))
