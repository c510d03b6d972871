"""The presets: one rule in the number of steps, and what `enable_cache` makes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lib.toy_pipeline import ToyPipeline
from lib.toys import denoise, make, noise

import cachedit_fx
from cachedit_fx import LagrangeCalibratorConfig, OptionError
from cachedit_fx.schedules.presets import MIN_COMPUTED, MIN_STEPS, SHARES, presets, spread_mask


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


def test_too_few_steps_are_refused_with_the_reason():
    with pytest.raises(OptionError, match="taking one step less gives a better picture"):
        presets(MIN_STEPS - 1)


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
