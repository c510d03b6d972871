"""Predicts a region's results from its results at computed steps, as a weighted sum of stored values.

    trail (steps so far, the latest first), present step ──► (c_0, c_1, ...)

Every predictor in use is linear in the stored values: the prediction is `sum_j c_j * Y_j`, with `Y_0` the value of the
latest computed step, `Y_1` of the computed step before it, and so on. So a calibrator is a pure function from the steps
so far to the coefficients `c_j`. A calibrator that fits its weights to the values (DMD) needs no more than their inner
products, which come with the trail. Each value is stored unchanged in a buffer of its own, and a prediction reads each
buffer once. Derivatives are never stored, and a computed step writes one buffer at any order.

`cachedit bench` measures the predictions' accuracy on the bundled model; docs/choosing.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from cachedit_fx.config.calibrators import (
    CalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    LagrangeCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from cachedit_fx.config.rules import ContractError, OptionError, check_config_class, reject_unknown
from cachedit_fx.runtime.dmd import dmd_weights

CORRECTED_RUN = 2
"""Highest number of computed steps after a gap with which the gap is still corrected. Each needs one more value."""


class Moment(NamedTuple):
    """One step of one CFG branch."""

    step: int
    """Its number in the generation."""
    time: float | None = None
    """Its timestep, in the model's unit; None if it is not known."""
    computed: bool = True
    """Whether the region was computed. Its values are then stored."""
    products: tuple[float, ...] = ()
    """Inner products of its stored value with the values of this and the earlier computed steps, the latest first. A
    value is all results of the region. Empty unless the calibrator asks for it (`Calibrator.uses_products`)."""


@dataclass(frozen=True)
class Calibrator:
    """One way to predict: the class of its settings, and two pure functions of them.

    Attributes:
        config_class: a `CalibratorConfig`.
        values_kept: config -> the number of computed steps whose values are stored.
        coefficients: (config, trail, now) -> the weights of the stored values in the prediction for `now`. The trail
            holds the steps so far, computed and reused, the latest first. At least one is computed. There is one weight
            for each computed step of the trail, in the trail's order. The weights sum to 1; zeros at the end may be
            left out.
        uses_products: whether the computed steps of the trail shall have `Moment.products`. They are computed with each
            stored value, and read back at the first reuse after computed steps.
    """

    config_class: type[CalibratorConfig]
    values_kept: Callable[[Any], int]
    coefficients: Callable[[Any, Sequence[Moment], Moment], tuple[float, ...]]
    uses_products: bool = False


CALIBRATORS: dict[str, Calibrator] = {}
"""Name in the option `calibrator` -> calibrator. The end of this file fills the table."""


def register_calibrator(name: str, calibrator: Calibrator) -> None:
    """Enter a calibrator under the name that `options={"calibrator": name}` takes.

    Raises:
        TypeError: if the calibrator's config class is no class of its own below `CalibratorConfig`.
        ValueError: if a calibrator of another config class has the name, or another name has the config class.
    """
    check_config_class(calibrator.config_class, CalibratorConfig, f"calibrator {name!r}")
    owner = CALIBRATORS[name].config_class if name in CALIBRATORS else calibrator.config_class
    config_class = calibrator.config_class
    if (owner.__module__, owner.__qualname__) != (config_class.__module__, config_class.__qualname__):
        raise ValueError(f"{name!r} is the name of the calibrator of {owner.__qualname__}: choose another name")
    others = [other for other, entry in CALIBRATORS.items() if entry.config_class is config_class and other != name]
    if others:
        raise ValueError(
            f"{config_class.__name__} is the config of the calibrator {others[0]!r}: "
            f"give {name!r} a config class of its own"
        )
    CALIBRATORS[name] = calibrator


def calibrator_of(config: CalibratorConfig | None) -> Calibrator:
    """The calibrator of a config, of its class or the nearest base class that has one; `REPEAT` for None.

    Raises:
        OptionError: if there is none.
    """
    if config is None:
        return REPEAT
    by_class = {calibrator.config_class: calibrator for calibrator in CALIBRATORS.values()}
    calibrator = next((by_class[base] for base in type(config).__mro__ if base in by_class), None)
    if calibrator is None:
        names = ", ".join(CALIBRATORS)
        raise OptionError(f"no calibrator is registered for {type(config).__name__}; there are {names}")
    return calibrator


def as_config(value: Any) -> Any:
    """The config for a name, or for a mapping with a `name` and settings. Any other value is returned unchanged."""
    is_mapping = isinstance(value, Mapping)
    settings: dict[str, Any] | None = {"name": value} if isinstance(value, str) else dict(value) if is_mapping else None
    if settings is None or settings.get("name") not in CALIBRATORS:
        return value
    config_class = CALIBRATORS[settings.pop("name")].config_class
    owners = dict.fromkeys((field.name for field in fields(config_class)), f"cachedit_fx.{config_class.__name__}")
    reject_unknown(settings, owners)
    return config_class(**settings)


def values_kept(config: CalibratorConfig | None) -> int:
    """The number of computed steps whose values are stored: 1 without a config, order + 1 for TaylorSeer.

    Raises:
        ContractError: if the calibrator returns anything but an integer from 1 up.
    """
    count = calibrator_of(config).values_kept(config)
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ContractError(
            f"values_kept of {type(config).__name__} returned {count!r}: it must be an integer >= 1, the number of "
            "computed steps whose values are stored"
        )
    return int(count)


def coefficients(config: CalibratorConfig | None, trail: Sequence[Moment], now: Moment) -> tuple[float, ...]:
    """The weights of the stored values in the prediction for `now`; see `Calibrator`.

    Raises:
        ContractError: if the calibrator returns no weight, more weights than values, or what is no finite number.
    """
    weights = calibrator_of(config).coefficients(config, trail, now)
    stored = sum(moment.computed for moment in trail)
    if not isinstance(weights, (tuple, list)) or not 0 < len(weights) <= stored or not all(map(_is_finite, weights)):
        raise ContractError(
            f"coefficients of {type(config).__name__} returned {weights!r} for step {now.step}: it must be a tuple of "
            f"1 to {stored} finite numbers, one for each computed step of the trail, the latest first. `values_kept` "
            "limits these steps"
        )
    return tuple(weights)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def taylor_coefficients(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """TaylorSeer with backward differences, as coefficients (arXiv 2503.06923, equation 5, spacing not assumed equal).

    At each computed step `d_0 = Y` and `d_{i+1} = (d_i - previous d_i) / w`, with `w` the number of steps since the
    previous computed step. The prediction for the k-th step after the latest is `sum_i d_i * k^i / i!`. The order is
    `len(computed) - 1`, so the first derivative is used from the second computed step on.

    Args:
        computed: numbers of the computed steps, the latest first.
        step: the number of the step to predict.
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

    A sampler moves by the output times the length of a step, `h`. When the step after a gap is computed, the error of
    the outputs `P_j` predicted in the gap becomes known. It is about `I_j - P_j`, with `I_j` on the polynomial through
    the steps on the gap's two sides, a line at least. The first prediction after the gap is

        sum_j l_j(now) Y_j + s sum_j h_j (I_j - P_j) / h_now

    If the share s is 1, the sampler is then at the place that interpolated outputs would have reached. `P_j` is counted
    without its own corrections, which belong to earlier predictions. `h_now` is not known yet, and the length of the
    previous step replaces it. Source: deferred (defect) correction, Pereyra 1966; Dutt, Greengard, Rokhlin 2000.

    Nothing is corrected if more than `CORRECTED_RUN` computed steps follow the gap, since the values that its
    predictions need are no longer stored.
    """
    points = config.lagrange_order + 1
    places = _places(config, [now, *trail])
    present, previous = places[0], places[1]
    nodes = [place for place, moment in zip(places[1:], trail, strict=True) if moment.computed]
    weights = _lagrange(nodes, 0, points, present)
    gap = next((index for index, moment in enumerate(trail) if not moment.computed), 0)
    is_cut_off = len(nodes) == _lagrange_values(config) and gap + points > len(nodes)
    if not config.deferred_correction or not gap or is_cut_off:
        return tuple(weights)
    # trail[0] is places[1], and the step after trail[index] has places[index]
    for index in range(gap, len(trail)):
        if trail[index].computed:
            break
        place, successor = places[index + 1], places[index]
        ratio = config.deferred_correction * (successor - place) / (present - previous)
        interpolation = _lagrange(nodes, gap - 1, max(points, 2), place)
        prediction = _lagrange(nodes, gap, points, place)
        weights = [w + ratio * (i - p) for w, i, p in zip(weights, interpolation, prediction, strict=True)]
    return tuple(weights)


def _places(config: LagrangeCalibratorConfig, moments: Sequence[Moment]) -> list[float]:
    """The polynomial's arguments for the moments, the latest first: timesteps, or step numbers.

    Step numbers are used if the config says so, if a timestep is unknown, or if the timesteps do not run one way.
    """
    times = [moment.time for moment in moments if moment.time is not None]
    if config.lagrange_variable == "timestep" and len(times) == len(moments):
        lengths = [new - old for new, old in zip(times, times[1:], strict=False)]
        if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
            return times
    return [float(moment.step) for moment in moments]


def _lagrange(nodes: Sequence[float], first: int, points: int, place: float) -> list[float]:
    """Weights of the values at all `nodes` in the polynomial through `points` of them, from `first` on, at `place`."""
    weights = [0.0] * len(nodes)
    indices = range(first, min(first + points, len(nodes)))
    for index in indices:
        others = (nodes[other] for other in indices if other != index)
        weights[index] = math.prod((place - other) / (nodes[index] - other) for other in others)
    return weights


def foca_coefficients(trail: Sequence[Moment], step: int) -> tuple[float, ...]:
    """FoCa, forecast and calibrate (arXiv 2508.16211, equation 8), as coefficients.

        P_k = Y_0 + k/2 [(Y_0 - Y_1) / w + (P_{k-1} - P_{k-2})]          P_0 = Y_0

    This is for the k-th step since the latest computed one, with `w` the steps between the latest two. `P_{-1}` is the
    value of the step just before the latest computed one: `Y_1` if that step was computed too, otherwise the prediction
    of a line. So half of the last prediction's error enters. The slope is divided by the spacing; otherwise a straight
    line would not be continued. For k > 3 the prediction moves back: `Y_0 + 3/k (P_3 - Y_0)`.

    Args:
        trail: the steps so far, the latest first.
        step: the number of the step to predict.
    """
    steps = [moment.step for moment in trail if moment.computed]

    def line(first: int, offset: int) -> list[float]:
        """Weights of the line through value `first` and the one before it, `offset` steps after value `first`."""
        weights = [float(index == first) for index in range(len(steps))]
        if first + 1 < len(steps):
            ratio = offset / (steps[first] - steps[first + 1])
            weights[first], weights[first + 1] = 1 + ratio, -ratio
        return weights

    latest = line(0, 0)
    if len(steps) == 1:
        return tuple(latest)
    slope = [new - old for new, old in zip(line(0, 1), latest, strict=True)]
    before, present = line(1, steps[0] - 1 - steps[1]), latest
    distance = step - steps[0]
    for k in range(1, min(distance, 3) + 1):
        sums = [s + new - old for s, new, old in zip(slope, present, before, strict=True)]
        before, present = present, [old + k / 2 * total for old, total in zip(latest, sums, strict=True)]
    factor = min(1.0, 3 / distance)
    return tuple(old + factor * (new - old) for new, old in zip(present, latest, strict=True))


def dmd_coefficients(config: DMDCalibratorConfig, trail: Sequence[Moment], now: Moment) -> tuple[float, ...]:
    """Dynamic mode decomposition of the computed steps; see `dmd_weights`. Steps without products are left out."""
    computed = [moment for moment in trail if moment.computed and moment.products]
    if not computed:
        return (1.0,)
    return dmd_weights(
        [moment.products for moment in computed], [moment.step for moment in computed], now.step, config.dmd_rank
    )


def _lagrange_values(config: LagrangeCalibratorConfig) -> int:
    return config.lagrange_order + 1 + CORRECTED_RUN * bool(config.deferred_correction)


REPEAT = Calibrator(CalibratorConfig, lambda config: 1, lambda config, trail, now: (1.0,))
"""The calibrator of the option None: the latest value is used again."""

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
register_calibrator(
    "dmd", Calibrator(DMDCalibratorConfig, lambda config: config.dmd_history, dmd_coefficients, uses_products=True)
)
