"""Predictions as weights on stored values: against the recurrence of the paper, through the memory, end to end."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import denoise, make

import cachedit_fx
from cachedit_fx import CalibratorConfig, DBCacheConfig, OptionError, TaylorSeerCalibratorConfig
from cachedit_fx.options import parse_options
from cachedit_fx.runtime.calibrators import coefficients, values_kept
from cachedit_fx.runtime.state import BranchMemory

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
    weights = coefficients(config, steps[::-1], steps[-1] + ahead)
    found = sum(weight * value for weight, value in zip(weights, values[::-1], strict=True))
    scale = sum(abs(weight) for weight in weights) * 10
    assert found == pytest.approx(recurrence(values, steps, len(steps) - 1, steps[-1] + ahead), abs=1e-9 * scale)


@given(SPACINGS, st.integers(1, 6))
def test_weights_sum_to_one(spacings: list[int], ahead: int) -> None:
    steps = list(itertools.accumulate(spacings))[::-1]
    weights = coefficients(TaylorSeerCalibratorConfig(taylorseer_order=4), steps, steps[0] + ahead)
    assert sum(weights) == pytest.approx(1, abs=1e-9 * sum(abs(weight) for weight in weights))


def test_first_order_continues_on_a_line() -> None:
    assert coefficients(TaylorSeerCalibratorConfig(), [5, 3], 8) == (2.5, -1.5)


def test_the_first_derivative_is_there_from_the_second_computed_step_on() -> None:
    assert coefficients(TaylorSeerCalibratorConfig(), [0], 3) == (1.0,)


def test_without_a_calibrator_the_latest_value_is_repeated() -> None:
    assert coefficients(None, [5, 3], 8) == (1.0, 0.0)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_memory_keeps_order_plus_one_values(order: int) -> None:
    memory, kept = BranchMemory(), values_kept(TaylorSeerCalibratorConfig(taylorseer_order=order))
    assert kept == order + 1
    for step in range(5):
        memory.store([torch.full((3,), float(step))], [None], step, kept)
    assert [buffer[0].item() for buffer in memory.stored[0]] == [4.0, 3.0, 2.0, 1.0][: order + 1]
    assert memory.bytes_held == (order + 1) * 3 * 8


def test_memory_predicts_what_moves_on_a_line() -> None:
    memory, config = BranchMemory(), TaylorSeerCalibratorConfig()
    base, slope = torch.randn(4, 5), torch.randn(4, 5)
    for step in (0, 1, 4):
        memory.store([base + step * slope], [base], step, values_kept(config))
    (found,) = memory.restore([base], coefficients(config, memory.steps, 7))
    torch.testing.assert_close(found, base + 7 * slope, rtol=1e-5, atol=1e-5)


def test_a_new_generation_predicts_from_its_own_values() -> None:
    memory = BranchMemory()
    memory.store([torch.ones(2)], [None], 0, 2)
    memory.forget()
    memory.store([torch.full((2,), 7.0)], [None], 0, 2)
    assert memory.steps == [0]
    (found,) = memory.restore([None], coefficients(TaylorSeerCalibratorConfig(), memory.steps, 3))
    assert found.tolist() == [7.0, 7.0]


def test_buffers_are_written_again() -> None:
    memory = BranchMemory()
    places = []
    for step in range(6):
        memory.store([torch.ones(2)], [None], step, 2)
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
        lambda: CalibratorConfig(calibrator_cache_type="residuals"),
    ],
)
def test_bad_settings_are_named(make: object) -> None:
    with pytest.raises(OptionError, match="is not allowed: it must be"):
        make()  # type: ignore[operator]


MASK = DBCacheConfig(
    Fn_compute_blocks=1, steps_computation_mask=(1, 1, 1, 0, 1, 0, 1, 0, 1, 0), steps_computation_policy="static"
)  # fmt: skip


def denoised(calibrator: CalibratorConfig | None, cache: DBCacheConfig | None = MASK) -> torch.Tensor:
    model = cachedit_fx.compile(make(), cache=cache, calibrator=calibrator, inner_backend="eager")
    return denoise(model)


def test_prediction_is_nearer_to_the_uncached_result_than_repetition() -> None:
    plain = denoise(make())
    errors = [
        (denoised(calibrator) - plain).abs().mean().item()
        for calibrator in (None, TaylorSeerCalibratorConfig(), TaylorSeerCalibratorConfig(taylorseer_order=2))
    ]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]


def test_order_0_repeats() -> None:
    assert torch.equal(denoised(TaylorSeerCalibratorConfig(taylorseer_order=0)), denoised(None))


def test_whole_values_are_predicted_on_request() -> None:
    whole = TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states")
    assert not torch.equal(denoised(whole), denoised(TaylorSeerCalibratorConfig()))


def test_a_calibrator_changes_nothing_where_nothing_is_cached() -> None:
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


def test_refresh_takes_a_calibrator() -> None:
    model = cachedit_fx.enable_cache(make(), MASK, inner_backend="eager")
    cachedit_fx.refresh_context(model, calibrator_config=TaylorSeerCalibratorConfig())
    assert torch.equal(denoise(model), denoised(TaylorSeerCalibratorConfig()))
