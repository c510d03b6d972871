"""Predicting what a region would have added, from what it added at computed steps: weights on stored values.

Every predictor in use is linear in the values that it has seen: the prediction is `sum_j c_j * Y_j`, with `Y_0` the
value of the latest computed step, `Y_1` of the one before, and so on. So a calibrator is a pure function from step
numbers to the coefficients `c_j`; the values are kept as they are, one buffer for each, and a prediction reads each of
them once. Derivatives are never stored, and a computed step writes one buffer whatever the order.

    step numbers of the computed steps, present step ──► (c_0, c_1, ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cachedit_fx.options import CalibratorConfig, TaylorSeerCalibratorConfig


def values_kept(config: CalibratorConfig | None) -> int:
    """How many computed steps' values the calibrator needs: 1 without one, order + 1 for TaylorSeer."""
    return 1 + config.taylorseer_order if isinstance(config, TaylorSeerCalibratorConfig) else 1


def coefficients(config: CalibratorConfig | None, computed: Sequence[int], step: int) -> tuple[float, ...]:
    """The weights of the stored values in the prediction for `step`.

    Args:
        config: None repeats the latest value.
        computed: numbers of the computed steps whose values are stored, the latest first; not empty.
        step: the present step, later than all of them.

    Returns:
        One weight for each of `computed`; they sum to 1.
    """
    if config is None:
        return (1.0, *(0.0 for _ in computed[1:]))
    return taylor_coefficients(computed, step)


def taylor_coefficients(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """TaylorSeer with backward differences, as coefficients (arXiv 2503.06923, equation 5, spacing not assumed equal).

    With `d_0 = Y` and `d_{i+1} = (d_i - previous d_i) / w` at each computed step, `w` being the steps since the one
    before it, the prediction is `sum_i d_i * k^i / i!` for the k-th step since the latest. The order is
    `len(computed) - 1`, so that the first derivative is there from the second computed step on.
    """
    count = len(computed)
    # derivative[j][m]: weight of value m in the derivative of the present order at the j-th latest computed step
    derivative = [[float(j == m) for m in range(count)] for j in range(count)]
    total = list(derivative[0])
    distance = step - computed[0]
    for order in range(1, count):
        derivative = [
            [(new - old) / (computed[j] - computed[j + 1]) for new, old in zip(*derivative[j : j + 2], strict=True)]
            for j in range(count - order)
        ]
        factor = distance**order / math.factorial(order)
        total = [weight + factor * slope for weight, slope in zip(total, derivative[0], strict=True)]
    return tuple(total)
