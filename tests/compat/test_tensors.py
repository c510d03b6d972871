"""Calibrators as classes on plain tensors."""

import pytest
import torch

import cachedit_fx.compat as cache_dit


def value(step):
    return torch.tensor([float(step), 2.0 * step + 1])


def test_taylorseer_continues_a_line():
    calibrator = cache_dit.TaylorSeerCalibrator(n_derivatives=1)
    calibrator.maybe_init_state()
    for step in range(6):
        calibrator.mark_step_begin()
        if step < 3:
            calibrator.update(value(step))
        else:
            assert torch.allclose(calibrator.approximate(), value(step))


def test_a_second_order_continues_a_parabola():
    calibrator = cache_dit.TaylorSeerCalibrator(n_derivatives=2, max_warmup_steps=5, skip_interval_steps=100)
    square = [torch.tensor([float(step**2)]) for step in range(8)]
    results = [calibrator.step(tensor if step < 5 else torch.full((1,), 1e9)) for step, tensor in enumerate(square)]
    # backward differences: the first derivative at step 4 is 7, the second 2
    assert [float(result) for result in results] == [0, 1, 4, 9, 16, 16 + 7 + 1, 16 + 14 + 4, 16 + 21 + 9]


def test_steps_compute_in_the_warm_up_and_at_the_interval():
    calibrator = cache_dit.TaylorSeerCalibrator(n_derivatives=0, max_warmup_steps=2, skip_interval_steps=3)
    results = [float(calibrator.step(torch.tensor(float(step)))) for step in range(8)]
    assert results == [0, 1, 1, 1, 4, 4, 4, 7]


def test_foca_continues_a_line_and_moves_back_after_the_third_step():
    calibrator = cache_dit.FoCaCalibrator()
    calibrator.maybe_init_state()
    predictions = []
    for step in range(9):
        calibrator.mark_step_begin()
        if step < 3:
            calibrator.update(value(step))
        else:
            predictions.append(calibrator.approximate())
    assert torch.allclose(predictions[0], value(3)) and predictions[0].dtype == torch.float32
    assert all(torch.isfinite(each).all() for each in predictions)
    assert abs(predictions[5][0] - 2) < abs(predictions[2][0] - 2)


def test_streams_are_separate_and_reset_forgets():
    calibrator = cache_dit.FoCaCalibrator()
    calibrator.step(value(1), name="image")
    calibrator.step(value(5), name="text")
    assert torch.equal(calibrator.step(value(9), name="image"), value(1))
    calibrator.reset_cache()
    assert torch.equal(calibrator.step(value(9), name="image"), value(9))
    assert repr(calibrator) == "FoCaCalibrator" and "O(2)" in repr(cache_dit.TaylorSeerCalibrator(2))


def test_another_shape_begins_anew():
    calibrator = cache_dit.TaylorSeerCalibrator(max_warmup_steps=9)
    for size in (2, 2, 3):
        calibrator.step(torch.ones(size) * size)
    calibrator.mark_step_begin()
    assert torch.equal(calibrator.approximate(), torch.ones(3) * 3)


def test_nothing_stored_is_an_error():
    with pytest.raises(RuntimeError, match="call update at a computed step first"):
        cache_dit.TaylorSeerCalibrator().approximate()
    with pytest.raises(ValueError, match="skip_interval_steps=0"):
        cache_dit.TaylorSeerCalibrator(skip_interval_steps=0)
