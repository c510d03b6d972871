"""The presets: one rule in steps and guidance, and what `enable_cache` makes of them."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lib.toy_pipeline import TEXTS, HasASchedulerToSpare, SlicesTimesteps, ToyPipeline
from lib.toys import denoise, noise
from lib.toys import make_small as make

import cachedit_fx
from cachedit_fx import LagrangeCalibratorConfig, OptionError
from cachedit_fx.config.options import parse_options
from cachedit_fx.runtime.calibrators import Moment, coefficients, values_kept
from cachedit_fx.runtime.policies.preset import PresetConfig
from cachedit_fx.schedules.presets import (
    MIN_COMPUTED,
    MIN_STEPS,
    PAID,
    SHARES,
    calibrator_for,
    graded_mask,
    preset,
    presets,
    spread_mask,
)


def digits(mask: list[int]) -> str:
    return "".join(map(str, mask))


@given(st.integers(2, 200), st.data())
def test_a_spread_mask_has_what_was_asked_for(steps, data):
    computed = data.draw(st.integers(2, steps))
    mask = spread_mask(steps, computed)
    assert len(mask) == steps and sum(mask) == computed and mask[0] == mask[-1] == 1
    ones = [step for step, digit in enumerate(mask) if digit]
    gaps = [after - before for before, after in zip(ones, ones[1:], strict=False)]
    run = next((index for index, gap in enumerate(gaps) if gap > 1), 0)
    assert max(gaps[run:]) - min(gaps[run:]) <= 1
    assert not mask[1] or max(gaps) <= 3


@pytest.mark.parametrize(
    ("steps", "computed", "expected"),
    [
        (28, 12, "1111001001001001001001001001"),
        (28, 9, "1001000100100010010010001001"),
        (28, 14, "1111010010100101010010100101"),
        (8, 4, "10100101"),
        (8, 6, "11011101"),
    ],
)
def test_masks_as_they_are(steps, computed, expected):
    assert digits(spread_mask(steps, computed)) == expected


@pytest.mark.parametrize("steps", [8, 9, 20, 28, 50, 100])
def test_one_rule_for_every_number_of_steps(steps):
    found = presets(steps)
    assert list(found) == list(SHARES)
    counts = []
    for name, settings in found.items():
        config = settings["cache_config"]
        counts.append(sum(config.steps_computation_mask))
        assert config.static and config.Fn_compute_blocks == 0 and len(config.steps_computation_mask) == steps
        assert counts[-1] <= max(SHARES[name] * steps, MIN_COMPUTED)
        assert settings["calibrator_config"] == LagrangeCalibratorConfig()
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("guidance", [1.0, 1.5, 3.0, 7.5])
@pytest.mark.parametrize("steps", [20, 28, 50])
def test_a_preset_has_its_work_at_any_guidance(steps, guidance):
    for name, settings in presets(steps, guidance).items():
        config = settings["cache_config"]
        assert config.static and config.steps_computation_mask[0] == 1
        assert sum(config.steps_computation_mask) / steps == pytest.approx(SHARES[name], abs=0.03 + 1e-9)


@given(st.integers(1, 200), st.data())
def test_gaps_of_a_graded_mask_grow(steps, data):
    computed = data.draw(st.integers(1, steps))
    mask = graded_mask(steps, computed, data.draw(st.floats(0, 1)))
    assert len(mask) == steps and sum(mask) == computed and mask[0] == 1
    ones = [step for step, digit in enumerate(mask) if digit]
    gaps = [after - before for before, after in itertools.pairwise(ones)]
    assert all(later >= earlier - 1 for earlier, later in itertools.combinations(gaps, 2))


@pytest.mark.parametrize("guidance", [None, 1.0, 1])
def test_one_branch_has_no_guidance(guidance):
    assert presets(28, guidance) == presets(28)


@pytest.mark.parametrize(("steps", "computed"), [(20, 5), (28, 7), (28, 14), (50, 25), (50, 10)])
def test_at_the_floor_a_preset_is_fewer_steps(steps, computed):
    """Repeated outputs on an even mask: each computed step is a step of the whole gap's length."""
    assert digits(graded_mask(steps, computed, 0.0)) == ("1" + "0" * (steps // computed - 1)) * computed
    floor = preset("fastest", steps, 50.0)
    assert floor["calibrator_config"] == LagrangeCalibratorConfig(lagrange_order=0, deferred_correction=0.0)
    assert sum(floor["cache_config"].steps_computation_mask[1:4]) == 0


def test_guidance_takes_accuracy_for_stability():
    """The line first, then the correction, sooner for fewer computed steps."""
    scales = [1 + index / 8 for index in range(60)]
    for name in SHARES:
        calibrators = [preset(name, 28, scale)["calibrator_config"] for scale in scales]
        orders = [config.lagrange_order for config in calibrators]
        shares = [config.deferred_correction for config in calibrators]
        assert orders == sorted(orders, reverse=True) and orders[0] == 1 and orders[-1] == 0
        assert shares == sorted(shares, reverse=True) and shares[orders.index(0)] == 1
    careful, fastest = (preset(name, 28, 5.0)["calibrator_config"] for name in ("careful", "fastest"))
    assert careful.deferred_correction > fastest.deferred_correction == 0
    assert calibrator_for(sum(PAID) / 2).deferred_correction == pytest.approx(0.5)


@pytest.mark.parametrize(("order", "share", "limit"), [(0, 0.0, 2.0), (0, 1.0, 1.2), (1, 1.0, 2 / 3)])
def test_the_three_methods_are_stable_up_to_their_limits(order, share, limit):
    """A model that pulls back by `pull` in three steps, one of them computed: below the limit the state decays."""
    config = LagrangeCalibratorConfig(lagrange_order=order, deferred_correction=share)
    for factor, decays in ((0.9, True), (1.1, False)):
        assert (abs(pulled_back(config, factor * limit)) < 1) is decays


def pulled_back(config, pull: float) -> float:
    """The state after 300 steps, 1 at first, if the model's output is `pull` / 3 times the state."""
    state = 1.0
    trail: list[Moment] = []
    stored: list[float] = []
    for step in range(300):
        now = Moment(step, -float(step), step % 3 == 0)
        if now.computed:
            stored.insert(0, state * pull / 3)
        weights = (1.0,) if now.computed else coefficients(config, trail, now)
        state -= sum(weight * value for weight, value in zip(weights, stored, strict=False))
        trail.insert(0, now)
        ends = [index for index, moment in enumerate(trail) if moment.computed][: values_kept(config)]
        trail, stored = trail[: ends[-1] + 1], stored[: len(ends)]
    return state


@pytest.mark.parametrize("steps", range(1, MIN_STEPS))
def test_with_too_few_steps_all_are_computed(steps):
    for guidance in (1.0, 3.0):
        for settings in presets(steps, guidance).values():
            assert settings["cache_config"].steps_computation_mask == (1,) * steps


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_what_is_no_number_of_steps_is_named(steps):
    with pytest.raises(OptionError, match="steps=.*denoising steps of a generation"):
        presets(steps)


def test_a_preset_by_name_is_its_settings():
    model = cachedit_fx.enable_cache(make(), preset="careful", steps=10, inner_backend="eager")
    result = denoise(model)
    (region,) = cachedit_fx.summary(model)
    assert region.executed_steps == 10 and region.work == pytest.approx(0.5)
    by_hand = cachedit_fx.enable_cache(make(), **presets(10)["careful"], inner_backend="eager")
    assert denoise(by_hand).equal(result)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 28}, "steps goes with preset"),
        ({"preset": "fast", "steps": "28"}, "steps='28' is not allowed: it must be a number of denoising steps"),
        ({"preset": "fast", "steps": True}, "steps=True is not allowed"),
        ({"preset": "fast", "steps": 0}, "steps=0 is not allowed"),
        ({"preset": "fasd", "steps": 28}, "did you mean 'fast'"),
        ({"preset": "fast", "steps": 28, "calibrator_config": LagrangeCalibratorConfig()}, "leave those out"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(OptionError, match=message):
        cachedit_fx.enable_cache(make(), **settings)


def by_enable_cache(**fields):
    cachedit_fx.enable_cache(make(), preset="fast", steps=12, inner_backend="eager", **fields)


def by_compile(**fields):
    cachedit_fx.compile(make(), cache="preset", preset="fast", steps=12, inner_backend="eager", **fields)


def by_torch(**fields):
    options = {"cache": "preset", "preset": "fast", "steps": 12, "inner_backend": "eager", **fields}
    parse_options(options)


HONOURED = {
    "Fn_compute_blocks": 0,
    "Bn_compute_blocks": 0,
    "enable_separate_cfg": True,
    "cfg_compute_first": False,
    "cfg_diff_compute_separate": False,
    "num_inference_steps": 12,
    "preset": "fast",
    "steps": 12,
}
"""Settings of a preset that have an effect, or allow one."""


@pytest.mark.parametrize("by", [by_enable_cache, by_compile, by_torch])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PresetConfig)])
def test_a_setting_beside_a_preset_has_an_effect_or_is_refused(by, name):
    if name in HONOURED:
        by(**({name: HONOURED[name]} if name not in ("preset", "steps") or by is by_torch else {}))
    else:
        with pytest.raises(OptionError, match=rf"{name}: a preset decides .* cache_config=DBCacheConfig"):
            by(**{name: OTHER_VALUES.get(name, getattr(PresetConfig, name))})


OTHER_VALUES = {"residual_diff_threshold": 0.0, "max_cached_steps": 2, "steps_computation_mask": "1" * 12}
"""The others are refused at their default too."""


def test_a_preset_config_is_checked_when_made():
    with pytest.raises(OptionError, match="max_warmup_steps, max_cached_steps: a preset decides"):
        PresetConfig(max_cached_steps=2, max_warmup_steps=2)


@pytest.mark.parametrize("scale", [math.nan, 10**400, [3.0]], ids=lambda scale: str(scale)[:6])
def test_a_pipeline_s_guidance_that_is_no_finite_number_is_unknown(scale):
    transformer = cachedit_fx.enable_cache(make(), preset="fast", inner_backend="eager")
    pipe: Any = ToyPipeline(transformer, TEXTS)
    pipe.guidance_scale = scale
    with pytest.warns(cachedit_fx.CacheWarning, match="is no finite number") as caught:
        for _ in range(2):
            result = pipe(noise(), 12)
    assert len(caught) == 1
    strongest = cachedit_fx.enable_cache(make(), **presets(12, math.inf)["fast"], inner_backend="eager")
    assert torch.equal(result, ToyPipeline(strongest, TEXTS)(noise(), 12))


@pytest.mark.parametrize("guidance", ["3", math.nan, True, [3.0]])
def test_a_guidance_that_is_no_number_is_named(guidance):
    with pytest.raises(OptionError, match="guidance=.* is not allowed: it must be a number"):
        presets(28, guidance=guidance)


def test_a_preset_alone_takes_the_number_of_steps_from_the_pipeline():
    transformer = cachedit_fx.enable_cache(make(), preset="balanced", inner_backend="eager")
    pipe = ToyPipeline(transformer)
    for steps, skip in ((12, 0), (20, 0), (20, 6)):
        result = pipe(noise(), steps=steps, skip=skip)
        (region,) = cachedit_fx.summary(pipe)
        assert region.executed_steps == steps - skip
        told = cachedit_fx.enable_cache(make(), preset="balanced", steps=steps - skip, inner_backend="eager")
        assert ToyPipeline(told)(noise(), steps=steps, skip=skip).equal(result)
        assert region.reasons == cachedit_fx.summary(told)[0].reasons and region.cached_steps


@pytest.mark.parametrize("kind", [HasASchedulerToSpare, SlicesTimesteps])
def test_a_preset_alone_counts_the_steps_that_are_left(kind):
    transformer = cachedit_fx.enable_cache(make(), preset="balanced", inner_backend="eager")
    pipe = kind(transformer)
    pipe(noise(), steps=20, skip=6 if kind is SlicesTimesteps else 0)
    (region,) = cachedit_fx.summary(pipe)
    steps = 14 if kind is SlicesTimesteps else 20
    mask = presets(steps)["balanced"]["cache_config"].steps_computation_mask
    assert region.executed_steps == steps and region.cached_steps == [i for i, digit in enumerate(mask) if not digit]


def test_a_preset_is_a_policy_by_name_too():
    model = cachedit_fx.compile(make(), cache="preset", preset="careful", steps=10, inner_backend="eager")
    by_hand = cachedit_fx.enable_cache(make(), preset="careful", steps=10, inner_backend="eager")
    assert denoise(model).equal(denoise(by_hand)) and cachedit_fx.summary(model)[0].cached_steps
    with pytest.raises(OptionError, match="cache='preset' brings its own calibrator"):
        cachedit_fx.compile(make(), cache="preset", calibrator="taylorseer")


def test_a_preset_alone_without_a_pipeline_computes_and_says_so():
    model = cachedit_fx.enable_cache(make(), preset="balanced", inner_backend="eager")
    with pytest.warns(cachedit_fx.CacheWarning, match="pass steps=") as caught:
        for _ in range(2):
            denoise(model)
    assert len(caught) == 1
    (region,) = cachedit_fx.summary(model)
    assert region.cached_steps == [] and denoise(model).equal(denoise(make()))


def test_another_number_of_steps_than_the_preset_s_is_told():
    model = cachedit_fx.enable_cache(make(), preset="balanced", steps=12, inner_backend="eager")
    denoise(model)
    with pytest.warns(cachedit_fx.CacheWarning, match="has 12 digits, and a generation had 10 steps"):
        denoise(model)


def test_warnings_name_the_user_s_line():
    model = cachedit_fx.enable_cache(make(), preset="balanced", steps=8, inner_backend="eager")
    with pytest.warns(cachedit_fx.CacheWarning, match="past its end") as caught:
        denoise(model)
    assert caught[0].filename.endswith("toys.py")
