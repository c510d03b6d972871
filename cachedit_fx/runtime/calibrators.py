"""Predicting what a region would have given, from what it gave at computed steps: weights on stored values.

Every predictor in use is linear in the values that it has seen: the prediction is `sum_j c_j * Y_j`, with `Y_0` the
value of the latest computed step, `Y_1` of the one before, and so on. So a calibrator is a pure function from the
steps so far to the coefficients `c_j`; the values are kept as they are, one buffer for each, and a prediction reads
each of them once. Derivatives are never stored, and a computed step writes one buffer whatever the order.

    trail (steps so far, the latest first), present step ──► (c_0, c_1, ...)

How well they predict, on the bundled model: `cachedit bench` (docs/choosing.md has the table).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from cachedit_fx.config.calibrators import (
    CalibratorConfig,
    FoCaCalibratorConfig,
    LagrangeCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from cachedit_fx.config.rules import reject_unknown

CORRECTED_RUN = 2
"""Computed steps in a row behind which a gap is still corrected. Each is one stored value more."""


class Moment(NamedTuple):
    """One step of one CFG branch."""

    step: int
    """Its number in the generation."""
    time: float | None = None
    """Its timestep, in the model's unit; None where it is not known."""
    computed: bool = True
    """Whether the region was computed; its values are stored then."""


@dataclass(frozen=True)
class Calibrator:
    """One way to predict: the class of its settings, and two pure functions of them.

    Attributes:
        config_class: a `CalibratorConfig`.
        values_kept: config -> how many computed steps' values are stored.
        coefficients: (config, trail, now) -> the weights of the stored values in the prediction for `now`. The trail
            holds the steps so far, the latest first, reused ones among them, at least one computed. There is one weight
            for each computed step of the trail, in its order, and the weights sum to 1; zeros at the end may be left
            out.
    """

    config_class: type[CalibratorConfig]
    values_kept: Callable[[Any], int]
    coefficients: Callable[[Any, Sequence[Moment], Moment], tuple[float, ...]]


CALIBRATORS: dict[str, Calibrator] = {}
"""By the name that the option `calibrator` takes. Filled in at the end of this file."""


def register_calibrator(name: str, calibrator: Calibrator) -> None:
    """Enter a calibrator under the name that `options={"calibrator": name}` takes."""
    CALIBRATORS[name] = calibrator


def calibrator_of(config: CalibratorConfig | None) -> Calibrator:
    """The calibrator that a config is for; None repeats the latest value."""
    if config is None:
        return REPEAT
    return next(calibrator for calibrator in CALIBRATORS.values() if calibrator.config_class is type(config))


def as_config(value: Any) -> Any:
    """The config that a name, or a mapping with a `name` and settings, stands for; anything else as it is."""
    is_mapping = isinstance(value, Mapping)
    settings: dict[str, Any] | None = {"name": value} if isinstance(value, str) else dict(value) if is_mapping else None
    if settings is None or settings.get("name") not in CALIBRATORS:
        return value
    config_class = CALIBRATORS[settings.pop("name")].config_class
    own = dict.fromkeys((field.name for field in fields(config_class)), f"cachedit_fx.{config_class.__name__}")
    reject_unknown(settings, own)
    return config_class(**settings)


def values_kept(config: CalibratorConfig | None) -> int:
    """How many computed steps' values are stored for this config: 1 without one, order + 1 for TaylorSeer."""
    return calibrator_of(config).values_kept(config)


def coefficients(config: CalibratorConfig | None, trail: Sequence[Moment], now: Moment) -> tuple[float, ...]:
    """The weights of the stored values in the prediction for `now`; see `Calibrator`."""
    return calibrator_of(config).coefficients(config, trail, now)


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


def lagrange_coefficients(config: LagrangeCalibratorConfig, trail: Sequence[Moment], now: Moment) -> tuple[float, ...]:
    """Lagrange's polynomial through the latest `lagrange_order` + 1 computed steps, and deferred correction.

    A sampler moves by the output times the length of a step, `h`. Once the step behind a gap is computed, the outputs
    `P_j` that were predicted in the gap are known to have been wrong by about `I_j - P_j`, with `I_j` on the polynomial
    through the steps on the gap's two sides. The first prediction behind the gap is

        sum_j l_j(now) Y_j + sum_j h_j (I_j - P_j) / h_now

    so that the sampler is, from then on, where interpolated outputs would have brought it. `P_j` counts without
    corrections of its own: those are owed to the predictions before. `h_now` is not known yet, and taken to be the
    length of the step before. Source: deferred (defect) correction, Pereyra 1966; Dutt, Greengard, Rokhlin 2000.

    Nothing is corrected where more than `CORRECTED_RUN` computed steps stand behind the gap, since what its predictions
    were made of is no longer stored.
    """
    points = config.lagrange_order + 1
    places = _places(config, [now, *trail])
    here, behind = places[0], places[1]
    nodes = [place for place, moment in zip(places[1:], trail, strict=True) if moment.computed]
    weights = _lagrange(nodes, 0, points, here)
    run = next((count for count, moment in enumerate(trail) if not moment.computed), 0)
    is_cut_off = len(nodes) == _lagrange_values(config) and run + points > len(nodes)
    if not config.deferred_correction or not run or is_cut_off:
        return tuple(weights)
    # trail[0] is places[1], and the step after trail[index] has places[index]
    for index in range(run, len(trail)):
        if trail[index].computed:
            break
        place, after = places[index + 1], places[index]
        ratio = (after - place) / (here - behind)
        better, used = _lagrange(nodes, run - 1, points, place), _lagrange(nodes, run, points, place)
        weights = [w + ratio * (b - u) for w, b, u in zip(weights, better, used, strict=True)]
    return tuple(weights)


def _places(config: LagrangeCalibratorConfig, moments: Sequence[Moment]) -> list[float]:
    """Where the polynomial has the moments, the latest first: at their timesteps, or where those do not all run one
    way, at their step numbers."""
    times = [moment.time for moment in moments if moment.time is not None]
    if config.lagrange_variable == "timestep" and len(times) == len(moments):
        lengths = [new - old for new, old in zip(times, times[1:], strict=False)]
        if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
            return times
    return [float(moment.step) for moment in moments]


def _lagrange(nodes: Sequence[float], first: int, points: int, place: float) -> list[float]:
    """Weights of the values at all `nodes` in the polynomial through `points` of them, from `first` on, at `place`."""
    weights = [0.0] * len(nodes)
    chosen = range(first, min(first + points, len(nodes)))
    for index in chosen:
        others = (nodes[other] for other in chosen if other != index)
        weights[index] = math.prod((place - other) / (nodes[index] - other) for other in others)
    return weights


def foca_coefficients(trail: Sequence[Moment], step: int) -> tuple[float, ...]:
    """FoCa, forecast and calibrate (arXiv 2508.16211, equation 8), as coefficients.

        P_k = Y_0 + k/2 [(Y_0 - Y_1) / w + (P_{k-1} - P_{k-2})]          P_0 = Y_0

    for the k-th step since the latest computed one, `w` being the steps between the latest two. `P_{-1}` is the value
    of the step just before the latest computed one: `Y_1` if that was computed too, else what a line predicted there;
    so half of the last prediction's error enters. The slope is divided by the spacing, without which a straight line
    would not be continued. Beyond k = 3 the prediction is drawn back: `Y_0 + 3/k (P_3 - Y_0)`.
    """
    steps = [moment.step for moment in trail if moment.computed]

    def line(first: int, ahead: int) -> list[float]:
        """Weights of the line through values `first` and the one before, `ahead` steps on."""
        weights = [float(index == first) for index in range(len(steps))]
        if first + 1 < len(steps):
            ratio = ahead / (steps[first] - steps[first + 1])
            weights[first], weights[first + 1] = 1 + ratio, -ratio
        return weights

    latest = line(0, 0)
    if len(steps) == 1:
        return tuple(latest)
    slope = [on - at for on, at in zip(line(0, 1), latest, strict=True)]
    before, present = line(1, steps[0] - 1 - steps[1]), latest
    distance = step - steps[0]
    for k in range(1, min(distance, 3) + 1):
        sums = [s + new - old for s, new, old in zip(slope, present, before, strict=True)]
        before, present = present, [at + k / 2 * both for at, both in zip(latest, sums, strict=True)]
    drawn = min(1.0, 3 / distance)
    return tuple(at + drawn * (on - at) for on, at in zip(present, latest, strict=True))


def _lagrange_values(config: LagrangeCalibratorConfig) -> int:
    return config.lagrange_order + 1 + CORRECTED_RUN * config.deferred_correction


REPEAT = Calibrator(CalibratorConfig, lambda config: 1, lambda config, trail, now: (1.0,))
"""Without a calibrator, the latest value is used again."""

register_calibrator(
    "taylorseer",
    Calibrator(
        TaylorSeerCalibratorConfig,
        lambda config: config.taylorseer_order + 1,
        lambda config, trail, now: taylor_coefficients([moment.step for moment in trail if moment.computed], now.step),
    ),
)
register_calibrator(
    "foca",
    Calibrator(FoCaCalibratorConfig, lambda config: 3, lambda config, trail, now: foca_coefficients(trail, now.step)),
)
register_calibrator("lagrange", Calibrator(LagrangeCalibratorConfig, _lagrange_values, lagrange_coefficients))
