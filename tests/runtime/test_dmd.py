"""Dynamic mode decomposition from inner products: against numpy's pinv of the snapshots, at the edges, end to end."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lib.shared import SharedCapture
from lib.toys import denoise, make

from cachedit_fx import DBCacheConfig, DMDCalibratorConfig, OptionError
from cachedit_fx.config.calibrators import Target
from cachedit_fx.runtime import memory as memories
from cachedit_fx.runtime.calibrators import Moment, coefficients, values_kept
from cachedit_fx.runtime.dmd import dmd_weights
from cachedit_fx.runtime.guard import read_back
from cachedit_fx.runtime.memory import BranchMemory


def products_of(values: np.ndarray) -> list[list[float]]:
    """Of the rows of `values`, the latest first."""
    gram = values @ values.T
    return [row[index:].tolist() for index, row in enumerate(gram)]


def predicted(values: np.ndarray, steps: list[int], step: int, rank: int = 0) -> np.ndarray:
    return np.array(dmd_weights(products_of(values), steps, step, rank)) @ values


def trajectory(rotations: list[tuple[float, float]], length: int, seed: int, width: int = 40) -> np.ndarray:
    """x_{k+1} = A x_k + b from damped rotations: [length, width], the earliest first."""
    generator = np.random.default_rng(seed)
    modes = generator.normal(size=(width, 2 * len(rotations)))
    amplitudes = generator.normal(size=2 * len(rotations))
    rows = []
    for k in range(length):
        parts = []
        for (radius, angle), (a, b) in zip(rotations, amplitudes.reshape(-1, 2), strict=True):
            cos, sin = radius**k * np.cos(angle * k), radius**k * np.sin(angle * k)
            parts += [a * cos - b * sin, a * sin + b * cos]
        rows.append(modes @ np.array(parts))
    return np.array(rows) + generator.normal(size=width)


def direct(values: np.ndarray, ahead: int) -> np.ndarray:
    """DMD of the changes as Schmid states it: A = Y pinv(X), applied again and again; `values` the earliest first."""
    changes = np.diff(values, axis=0).T
    matrix = changes[:, 1:] @ np.linalg.pinv(changes[:, :-1])
    change, result = changes[:, -1], values[-1].copy()
    for _ in range(ahead):
        change = matrix @ change
        result += change
    return result


@given(st.integers(0, 99), st.integers(3, 6), st.integers(1, 4), st.integers(1, 3))
def test_weights_equal_the_pinv_of_the_snapshots(seed: int, count: int, ahead: int, spacing: int) -> None:
    values = trajectory([(0.9, 0.4), (0.8, 1.1), (0.95, 0.2)], count, seed)
    steps = [spacing * index for index in range(count)][::-1]
    result = predicted(values[::-1], steps, steps[0] + ahead * spacing)
    expected = direct(values, ahead)
    assert np.linalg.norm(result - expected) < 1e-4 * np.linalg.norm(values)


@given(st.integers(0, 99), st.floats(0.7, 1.0), st.floats(0.1, 1.0), st.integers(1, 9), st.integers(1, 3))
def test_a_linear_system_is_continued_exactly(seed: int, radius: float, angle: float, ahead: int, every: int) -> None:
    """Between snapshots too: every third step computed, and the steps between are powers 1/3 of the map."""
    truth = trajectory([(radius, angle)], 3 * every + ahead + 1, seed)
    steps = [3 * every, 2 * every, every, 0]
    result = predicted(truth[steps], steps, 3 * every + ahead)
    assert np.linalg.norm(result - truth[3 * every + ahead]) < 1e-3 * np.linalg.norm(truth)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_a_line_and_a_constant_are_continued_at_any_spacing(spacings: list[int], ahead: int, seed: int) -> None:
    steps = np.cumsum([0, *spacings])[::-1].tolist()
    start, slope = np.random.default_rng(seed).normal(size=(2, 30))
    line = np.array([start + step * slope for step in steps])
    step = steps[0] + ahead
    np.testing.assert_allclose(predicted(line, steps, step), start + step * slope, atol=1e-4 * step)
    constant = np.array([start] * len(steps))
    np.testing.assert_allclose(predicted(constant, steps, step), start, rtol=1e-12)
    assert not predicted(0 * constant, steps, step).any()


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5), st.integers(1, 8))
def test_weights_sum_to_one_and_stay_bounded(values: list[float], ahead: int) -> None:
    """Any Gram matrix, singular ones too: the values are numbers, so the rank is 1."""
    weights = dmd_weights(products_of(np.array(values)[:, None]), [9, 7, 6, 4, 0], 9 + ahead)
    assert sum(weights) == pytest.approx(1, abs=1e-9 * sum(map(abs, weights)))
    assert np.isfinite(weights).all()


def test_few_values_are_repeated_or_continued_on_a_line() -> None:
    assert dmd_weights([[4.0]], [3], 8) == (1.0,)
    assert dmd_weights([[4.0, 2.0], [1.0]], [5, 3], 8) == pytest.approx((2.5, -1.5))


@pytest.mark.parametrize("product", [float("nan"), float("inf")])
def test_the_latest_value_is_repeated_if_products_are_not_finite(product: float) -> None:
    assert dmd_weights([[product, 1.0, 1.0], [1.0, 1.0], [1.0]], [2, 1, 0], 3) == (1.0,)


def test_changes_that_begin_suddenly_do_not_explode() -> None:
    values = np.array([[1.0, 1.0], [1.0, 1e-3], [1.0, 0.0]])
    (_, second) = predicted(values, [2, 1, 0], 6)
    assert 1 < second < 1 + 2**5


def test_the_rank_limits_the_modes() -> None:
    values = trajectory([(0.9, 0.4), (0.5, 1.5)], 6, seed=1)[::-1]
    steps = list(range(6))[::-1]
    results = [predicted(values, steps, 7, rank) for rank in (0, 1, 4)]
    np.testing.assert_allclose(results[0], results[2])
    assert np.linalg.norm(results[0] - results[1]) > 0.01


@pytest.mark.parametrize(
    ("dtype", "state"), [(torch.float32, "wider"), (torch.bfloat16, "wider"), (torch.float16, "model")]
)
def test_memory_keeps_the_products_of_all_results(dtype: torch.dtype, state: str) -> None:
    memory, config = BranchMemory(), DMDCalibratorConfig(dmd_history=3)
    kept = values_kept(config)
    values = [(300 * torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype), torch.arange(3)) for _ in range(5)]
    for step, results in enumerate(values):
        memory.store(results, [None] * 3, Moment(step), kept, state, products=True)
    flat = torch.stack([torch.cat([part.flatten().double() for part in results[:2]]) for results in values[:1:-1]])
    expected = [row[index:] for index, row in enumerate((flat @ flat.T).tolist())]
    for moment, row in zip(memory.read_trail(), expected, strict=True):
        assert moment.products[: len(row)] == pytest.approx(row, rel=1e-6, abs=0.1)


def test_a_new_generation_forgets_the_products_and_may_take_them_back() -> None:
    memory = BranchMemory()
    memory.store([torch.ones(2)], [None], Moment(0), 2, products=True)
    restore = memory.forget()
    assert memory.read_trail() == []
    restore()
    assert memory.read_trail() == [Moment(0, products=(2.0,))]
    memory.forget()
    memory.store([torch.full((2,), 3.0)], [None], Moment(0), 2, products=True)
    assert memory.read_trail() == [Moment(0, products=(18.0,))]


def test_steps_without_products_are_left_out() -> None:
    """As after a change of the calibrator in the middle of a generation."""
    config, now = DMDCalibratorConfig(), Moment(4)
    assert coefficients(config, [Moment(1), Moment(0)], now) == (1.0,)
    trail = [Moment(3, products=(4.0, 3.0, 1.0)), Moment(2, products=(2.5, 1.0)), Moment(1)]
    assert coefficients(config, trail, now) == pytest.approx((2.0, -1.0))


def test_settings_are_checked() -> None:
    with pytest.raises(OptionError, match="dmd_history=1 is not allowed: it must be an integer >= 2"):
        DMDCalibratorConfig(dmd_history=1)
    assert coefficients(DMDCalibratorConfig(), [Moment(1, products=(1.0,))], Moment(2)) == (1.0,)


MASK = DBCacheConfig(
    Fn_compute_blocks=0, steps_computation_mask=(1, 1, 1, 0, 0, 1, 0, 1, 1, 0), steps_computation_policy="static"
)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("target", ["residual", "output"])
def test_a_model_is_predicted_better_than_by_repetition_and_read_once_a_gap(
    monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    sizes: list[int] = []

    def counting(values: list[torch.Tensor]) -> list[float]:
        sizes.append(len(values))
        return read_back(values)

    monkeypatch.setattr(memories, "read_back", counting)
    shared, plain = SharedCapture(make()), denoise(make())
    errors = []
    for calibrator in (None, DMDCalibratorConfig(calibrator_cache_type=target)):
        assert not sizes
        shared.compile_anew(cache=MASK, calibrator=calibrator)
        errors.append((denoise(shared) - plain).abs().mean().item())
    assert sizes == [3, 1, 2]  # one transfer a gap, of the computed steps since the last one
    assert errors[1] < 0.5 * errors[0]
