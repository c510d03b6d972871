"""Predictions as weights on stored values: against the recurrence of the paper, through the memory, end to end."""

import itertools
import math
from typing import Any, Protocol

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lib.helpers import UNMOVED
from lib.shared import SharedCapture
from lib.toys import denoise, make, noise

import cachedit_fx
from cachedit_fx import (
    CalibratorConfig,
    DBCacheConfig,
    FoCaCalibratorConfig,
    LagrangeCalibratorConfig,
    OptionError,
    TaylorSeerCalibratorConfig,
)
from cachedit_fx.config.options import parse_options
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.runtime.calibrators import CORRECTED_RUN, Moment, coefficients, values_kept
from cachedit_fx.runtime.memory import BranchMemory


def computed(*steps: int) -> list[Moment]:
    """A trail of computed steps, the latest first."""
    return [Moment(step) for step in steps]


SPACINGS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def recurrence(values: list[float], steps: list[int], order: int, now: int) -> float:
    """TaylorSeer as the paper states it: derivatives updated at each computed step, oldest first."""
    derivatives: list[float] = []
    for index, value in enumerate(values):
        new = [value]
        for previous in derivatives[:order]:
            new.append((new[-1] - previous) / (steps[index] - steps[index - 1]))
        derivatives = new
    return sum(d * (now - steps[-1]) ** i / math.factorial(i) for i, d in enumerate(derivatives))


@given(SPACINGS, st.integers(1, 6), st.data())
def test_weights_equal_the_recurrence(spacings: list[int], ahead: int, data: st.DataObject) -> None:
    steps = list(itertools.accumulate(spacings))
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(steps), max_size=len(steps)))
    config = TaylorSeerCalibratorConfig(taylorseer_order=len(steps) - 1)
    weights = coefficients(config, computed(*steps[::-1]), Moment(steps[-1] + ahead))
    found = sum(weight * value for weight, value in zip(weights, values[::-1], strict=True))
    scale = sum(abs(weight) for weight in weights) * 10
    assert found == pytest.approx(recurrence(values, steps, len(steps) - 1, steps[-1] + ahead), abs=1e-9 * scale)


@given(SPACINGS, st.integers(1, 6))
def test_weights_sum_to_one(spacings: list[int], ahead: int) -> None:
    steps = list(itertools.accumulate(spacings))[::-1]
    weights = coefficients(TaylorSeerCalibratorConfig(taylorseer_order=4), computed(*steps), Moment(steps[0] + ahead))
    assert sum(weights) == pytest.approx(1, abs=1e-9 * sum(abs(weight) for weight in weights))


def test_first_order_continues_on_a_line() -> None:
    assert coefficients(TaylorSeerCalibratorConfig(), computed(5, 3), Moment(8)) == (2.5, -1.5)


def test_the_first_derivative_is_there_from_the_second_computed_step_on() -> None:
    assert coefficients(TaylorSeerCalibratorConfig(), computed(0), Moment(3)) == (1.0,)


def test_without_a_calibrator_the_latest_value_is_repeated() -> None:
    assert coefficients(None, computed(5, 3), Moment(8)) == (1.0,)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_memory_keeps_order_plus_one_values(order: int) -> None:
    memory, kept = BranchMemory(), values_kept(TaylorSeerCalibratorConfig(taylorseer_order=order))
    assert kept == order + 1
    for step in range(5):
        memory.store([torch.full((3,), float(step))], [None], Moment(step), kept)
    assert [buffer[0].item() for buffer in memory.stored[0]] == [4.0, 3.0, 2.0, 1.0][: order + 1]
    assert memory.bytes_held == (order + 1) * 3 * 8


def test_memory_predicts_what_moves_on_a_line() -> None:
    memory, config = BranchMemory(), TaylorSeerCalibratorConfig()
    base, slope = torch.randn(4, 5), torch.randn(4, 5)
    for step in (0, 1, 4):
        memory.store([base + step * slope], [base], Moment(step), values_kept(config))
    (found,) = memory.restore([base], coefficients(config, memory.trail, Moment(7)))
    torch.testing.assert_close(found, base + 7 * slope, rtol=1e-5, atol=1e-5)


def test_a_new_generation_predicts_from_its_own_values() -> None:
    memory = BranchMemory()
    memory.store([torch.ones(2)], [None], Moment(0), 2)
    memory.forget()
    memory.store([torch.full((2,), 7.0)], [None], Moment(0), 2)
    assert memory.trail == [Moment(0)]
    (found,) = memory.restore([None], coefficients(TaylorSeerCalibratorConfig(), memory.trail, Moment(3)))
    assert found.tolist() == [7.0, 7.0]


def test_buffers_are_written_again() -> None:
    memory = BranchMemory()
    places = []
    for step in range(6):
        memory.store([torch.ones(2)], [None], Moment(step), 2)
        places.append({buffer.data_ptr() for buffer in memory.stored[0]})
    assert all(place == places[1] for place in places[2:])


def test_options_take_a_name_or_a_config() -> None:
    assert parse_options({"calibrator": "taylorseer"}).calibrator == TaylorSeerCalibratorConfig()
    config = TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert parse_options({"calibrator": config}).calibrator is config
    assert parse_options({"calibrator": config}).structure() == parse_options({}).structure()


@pytest.mark.parametrize(
    "make",
    [
        lambda: parse_options({"calibrator": "taylor"}),
        lambda: TaylorSeerCalibratorConfig(taylorseer_order=-1),
        lambda: parse_options({"calibrator": {"name": "foca", "calibrator_cache_type": "residuals"}}),
    ],
)
def test_bad_settings_are_named(make: object) -> None:
    with pytest.raises(OptionError, match="is not allowed: it must be"):
        make()  # type: ignore[operator]


MASK = DBCacheConfig(
    Fn_compute_blocks=1, steps_computation_mask=(1, 1, 1, 0, 1, 0, 1, 0, 1, 0), steps_computation_policy="static"
)  # fmt: skip


class Denoised(Protocol):
    def __call__(self, calibrator: CalibratorConfig | None, cache: DBCacheConfig | None = ...) -> torch.Tensor: ...


@pytest.fixture(scope="module")
def denoised() -> Denoised:
    """What a toy gives under a calibrator, each time as if it had never been called; one capture serves all."""
    shared = SharedCapture(make())

    def denoised(calibrator: CalibratorConfig | None, cache: DBCacheConfig | None = MASK) -> torch.Tensor:
        shared.compile_anew(cache=cache, calibrator=calibrator)
        return denoise(shared)

    return denoised


@pytest.mark.keep_compiled
def test_prediction_is_nearer_to_the_uncached_result_than_repetition(denoised: Denoised) -> None:
    plain = denoise(make())
    errors = [
        (denoised(calibrator) - plain).abs().mean().item()
        for calibrator in (None, TaylorSeerCalibratorConfig(), TaylorSeerCalibratorConfig(taylorseer_order=2))
    ]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]


@pytest.mark.keep_compiled
def test_order_0_repeats(denoised: Denoised) -> None:
    assert torch.equal(denoised(TaylorSeerCalibratorConfig(taylorseer_order=0)), denoised(None))


@pytest.mark.keep_compiled
def test_whole_values_are_predicted_on_request(denoised: Denoised) -> None:
    whole = TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states")
    assert not torch.equal(denoised(whole), denoised(TaylorSeerCalibratorConfig()))


@pytest.mark.keep_compiled
def test_a_calibrator_changes_nothing_where_nothing_is_cached(denoised: Denoised) -> None:
    cache = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert torch.equal(denoised(TaylorSeerCalibratorConfig(), cache), denoise(make()))


def test_changing_the_calibrator_compiles_nothing() -> None:
    model, compilations = make(), []

    def inner(gm: torch.fx.GraphModule, _: object) -> object:
        compilations.append(gm)
        return gm.forward

    results = []
    for calibrator in (None, TaylorSeerCalibratorConfig(), None):
        cachedit_fx.enable_cache(model, MASK, calibrator, inner_backend=inner)
        results.append(denoise(model))
        if len(results) == 1:
            first = len(compilations)
    assert first > 0 and len(compilations) == first
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


@pytest.mark.keep_compiled
def test_refresh_takes_a_calibrator(denoised: Denoised) -> None:
    model = cachedit_fx.enable_cache(make(), MASK, inner_backend="eager")
    cachedit_fx.refresh_context(model, calibrator_config=TaylorSeerCalibratorConfig())
    assert torch.equal(denoise(model), denoised(TaylorSeerCalibratorConfig()))


# ---------------------------------------------------------------------------------------------------------------------
# Lagrange and deferred correction

NO_CORRECTION = LagrangeCalibratorConfig(deferred_correction=False)


def moments(mask: str, times: list[float] | None = None) -> list[Moment]:
    """A trail from a mask, "1" computed, the latest first."""
    made = [Moment(step, times[step] if times else None, digit == "1") for step, digit in enumerate(mask)]
    return made[::-1]


@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.sampled_from([-1.0, 1.0]), st.data())
def test_lagrange_is_exact_for_polynomials_in_time(lengths: list[int], sign: float, data: st.DataObject) -> None:
    times = [sign * float(t) for t in itertools.accumulate(lengths)]
    order = data.draw(st.integers(0, 2))
    factors = data.draw(st.lists(st.floats(-1, 1), min_size=order + 1, max_size=order + 1))
    config = LagrangeCalibratorConfig(lagrange_order=order, deferred_correction=False)
    *past, now = [Moment(step, time) for step, time in enumerate(times)]
    trail = past[::-1][: values_kept(config)]

    def value(moment: Moment) -> float:
        return sum(factor * (moment.time or 0.0) ** power for power, factor in enumerate(factors))

    weights = coefficients(config, trail, now)
    found = sum(weight * value(moment) for weight, moment in zip(weights, trail, strict=True))
    assert found == pytest.approx(value(now), abs=1e-6 * (1 + max(map(abs, times)) ** 2 * sum(map(abs, weights))))


@pytest.mark.parametrize("times", [None, [9.0, 8.0, 7.0, 5.0, 5.0], [9.0, 8.0, 7.0, 5.0, 6.0], [math.nan] * 5])
def test_steps_are_counted_where_the_timestep_does_not_run_one_way(times: list[float] | None) -> None:
    *past, now = [Moment(step, times[step] if times else None) for step in range(5)]
    assert coefficients(NO_CORRECTION, past[::-1][:2], now) == pytest.approx((2.0, -1.0))


def test_the_variable_may_be_the_step() -> None:
    trail, now = [Moment(1, 8.0), Moment(0, 10.0)], Moment(2, 7.0)
    config = LagrangeCalibratorConfig(deferred_correction=False, lagrange_variable="step")
    assert coefficients(config, trail, now) == pytest.approx((2.0, -1.0))
    assert coefficients(NO_CORRECTION, trail, now) == pytest.approx((1.5, -0.5))


def sampled(mask: str, values: list[float], times: list[float], config: LagrangeCalibratorConfig) -> list[float]:
    """What a sampler is given, step by step, where the model would put out `values`."""
    given: list[float] = []
    stored: list[float] = []
    trail: list[Moment] = []
    for step, digit in enumerate(mask):
        now = Moment(step, times[step], digit == "1")
        if now.computed:
            stored.insert(0, values[step])
            given.append(values[step])
        else:
            weights = coefficients(config, trail, now)
            given.append(sum(w * y for w, y in zip(weights, stored, strict=False)))
        trail.insert(0, now)
        ends = [index for index, moment in enumerate(trail) if moment.computed][: values_kept(config)]
        trail, stored = trail[: ends[-1] + 1], stored[: values_kept(config)]
    return given


@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.lists(st.floats(-5, 5), min_size=10, max_size=10),
    st.integers(0, 1),
    st.floats(0.01, 1),
)
def test_correction_brings_the_sampler_where_interpolation_would_have(
    gap: int, run: int, values: list[float], order: int, share: float
) -> None:
    """Over steps of one length the sum of all outputs is that of the interpolated ones, once the correction is made;
    with a share of it, the sum is that share nearer. After a longer run of computed steps it is not."""
    mask = "11" + "0" * gap + "1" * run + "0"
    steps = len(mask)
    values, times = values[:steps], [float(-step) for step in range(steps)]
    corrected, plain = (
        sampled(mask, values, times, LagrangeCalibratorConfig(lagrange_order=order, deferred_correction=amount))
        for amount in (share, 0.0)
    )
    first, last = values[1], values[2 + gap]
    between = [first + (last - first) * index / (gap + 1) for index in range(1, gap + 1)]
    assert corrected[:-1] == plain[:-1]
    if run <= CORRECTED_RUN:
        missing = sum(between) - sum(plain[2 : 2 + gap])
        assert sum(corrected) == pytest.approx(sum(plain) + share * missing, abs=1e-9)
    else:
        assert corrected == pytest.approx(plain)


def test_correction_is_made_once_and_weighs_the_lengths_of_steps() -> None:
    times = [10.0, 9.0, 7.0, 6.0, 5.0, 4.0]
    values = [0.0, 1.0, 0.0, 5.0, 0.0, 0.0]
    found = sampled("110100", values, times, LagrangeCalibratorConfig())
    predicted = 1.0 + 2.0  # a slope of 1 over a step of 1, two further on
    interpolated = 1.0 + 4.0 * 2 / 3
    missing = (interpolated - predicted) * 1.0 / 1.0  # length of the step that was predicted, over the one before now
    line = [5.0 + 4.0 / 3, 5.0 + 4.0 / 3 * 2]
    assert found[2] == pytest.approx(predicted)
    assert found[4:] == pytest.approx([line[0] + missing, line[1]])


@pytest.mark.parametrize("mask", ["111", "1", "110110", "10"])
def test_nothing_is_corrected_twice_or_where_nothing_was_predicted(mask: str) -> None:
    trail = moments(mask)
    now = Moment(len(mask))
    assert coefficients(LagrangeCalibratorConfig(), trail, now) == coefficients(NO_CORRECTION, trail, now)


@given(st.text("01", min_size=1, max_size=12), st.integers(0, 2), st.booleans())
def test_weights_of_every_trail_sum_to_one(tail: str, order: int, corrects: bool) -> None:
    config = LagrangeCalibratorConfig(lagrange_order=order, deferred_correction=corrects)
    trail = moments("1" + tail)
    ends = [index for index, moment in enumerate(trail) if moment.computed][: values_kept(config)]
    weights = coefficients(config, trail[: ends[-1] + 1], Moment(len(trail)))
    assert sum(weights) == pytest.approx(1, abs=1e-6 * sum(map(abs, weights)))


SPARSE = DBCacheConfig(0, steps_computation_policy="static", steps_computation_mask=[1, 0, 1, 0, 0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("granularity", ["block", "region"])
@pytest.mark.parametrize("first", [0, 1])
def test_the_output_is_predicted_and_a_cached_step_runs_what_is_left(first: int, granularity: str) -> None:
    config = SPARSE.reset(Fn_compute_blocks=first)
    model = cachedit_fx.enable_cache(
        make(),
        config,
        LagrangeCalibratorConfig(),
        inner_backend="eager",
        granularity=granularity,
        passes=UNMOVED,
    )
    plain = denoise(make())
    assert (denoise(model) - plain).abs().max() < 0.05 * plain.abs().max()
    (region,) = cachedit_fx.summary(model)
    cached = region.num_blocks - first
    assert region.work == pytest.approx(1 - 0.5 * cached / region.num_blocks)
    with FlopCounter() as less:
        denoise(model)
    cachedit_fx.enable_cache(
        model, config.reset(steps_computation_mask="1" * 10), LagrangeCalibratorConfig(),
        inner_backend="eager", granularity=granularity, passes=UNMOVED,
    )  # fmt: skip
    with FlopCounter() as all_of_it:
        assert torch.equal(denoise(model), plain)
    if first == 0:
        assert less.flops * 2 == all_of_it.flops
    assert less.flops < 0.7 * all_of_it.flops


@pytest.mark.keep_compiled
def test_output_and_correction_are_nearer_than_residuals_at_equal_work(denoised: Denoised) -> None:
    plain = denoise(make())

    def error(calibrator: CalibratorConfig) -> float:
        return (denoised(calibrator, SPARSE) - plain).square().mean().item()

    corrected = error(LagrangeCalibratorConfig())
    assert corrected < error(NO_CORRECTION)
    assert corrected < error(TaylorSeerCalibratorConfig())


def test_identical_inputs_give_the_identical_output_with_any_calibrator() -> None:
    """Weights that sum to one leave what never changes as it is."""
    hidden, text, step = noise(), noise(1, 3, seed=5), torch.tensor([3.0])
    for calibrator in (LagrangeCalibratorConfig(), FoCaCalibratorConfig(), TaylorSeerCalibratorConfig()):
        config = SPARSE.reset(steps_computation_mask="1101001000", enable_separate_cfg=False)
        model = cachedit_fx.enable_cache(make(), config, calibrator, inner_backend="eager")
        with torch.no_grad():
            results = [model(hidden, step, text) for _ in range(10)]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("kind", "size"), [("wider", 8), ("float32", 4), ("model", 4)])
def test_stored_values_have_the_dtype_asked_for(kind: str, size: int) -> None:
    settings: dict[str, Any] = {"calibrator_state_dtype": kind}
    calibrator = LagrangeCalibratorConfig(**settings)
    model = cachedit_fx.enable_cache(make(), SPARSE, calibrator, inner_backend="eager")
    result = denoise(model)
    (region,) = cachedit_fx.summary(model)
    assert region.bytes_held == 4 * result.numel() * size


def test_memory_is_order_plus_one_times_results_times_branches() -> None:
    for order in (1, 2):
        model = make()
        config = MASK.reset(enable_separate_cfg=True)
        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order)
        cachedit_fx.enable_cache(model, config, calibrator, inner_backend="eager")
        with torch.no_grad():
            for call in range(12):
                model(noise(), torch.tensor([10.0 - call // 2]), noise(1, 3, seed=5))
        (region,) = cachedit_fx.summary(model)
        assert len(region.branches) == 2
        results, branches = noise().numel() + noise(1, 3, seed=5).numel(), 2
        assert region.bytes_held == (order + 1) * results * branches * 8  # float64 beside a float32 model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "loop"}, "scope='loop' decides"),
        ({"Bn_compute_blocks": 1}, "Bn_compute_blocks=1 must be 0"),
        ({"calibrator": {"name": "lagrange", "lagrange_ordre": 2}}, "nearest known one is 'lagrange_order'"),
        ({"calibrator": {"name": "lagrang"}}, "is not allowed"),
        ({"calibrator": {"name": "lagrange", "lagrange_variable": "time"}}, "did you mean 'timestep'"),
        ({"calibrator": {"name": "lagrange", "deferred_correction": 1.5}}, "a share from 0 to 1"),
    ],
)
def test_settings_at_odds_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options({"calibrator": "lagrange"} | settings)


# ---------------------------------------------------------------------------------------------------------------------
# FoCa


@given(SPACINGS.filter(lambda spacings: len(spacings) > 2), st.integers(1, 3))
def test_foca_continues_a_line_up_to_the_third_step(spacings: list[int], ahead: int) -> None:
    steps = list(itertools.accumulate(spacings))[::-1]
    trail = [Moment(step, None, step in steps) for step in range(steps[0], steps[2] - 1, -1)]
    weights = coefficients(FoCaCalibratorConfig(), trail, Moment(steps[0] + ahead))
    found = sum(weight * step for weight, step in zip(weights, steps[:3], strict=True))
    assert found == pytest.approx(steps[0] + ahead)


def test_foca_takes_half_of_the_last_prediction_s_error() -> None:
    trail = moments("1100001")  # 0, 1 computed, a line predicted 5 for step 5, and step 6 gave 9 instead of 6
    values = [9.0, 1.0, 0.0]
    slope, latest = (9.0 - 1.0) / 5, 9.0 - 5.0
    weights = coefficients(FoCaCalibratorConfig(), trail, Moment(7))
    assert sum(w * y for w, y in zip(weights, values, strict=True)) == pytest.approx(9.0 + (slope + latest) / 2)


def test_foca_comes_back_to_the_latest_value_beyond_the_third_step() -> None:
    trail = moments("11")
    ahead = [coefficients(FoCaCalibratorConfig(), trail, Moment(1 + k))[0] - 1 for k in range(1, 9)]
    assert ahead[:3] == pytest.approx([1, 2, 3])
    assert ahead[3:] == pytest.approx([3 * 3 / k for k in range(4, 9)])
