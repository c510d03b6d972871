"""Settings of each block loop by itself."""

import pytest
import torch
from lib import models
from lib.toys import make

import cachedit_fx
from cachedit_fx import DBCacheConfig, LagrangeCalibratorConfig, OptionError, ParamsModifier, TaylorSeerCalibratorConfig
from cachedit_fx.config.options import parse_options

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
BASE = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9)
STEPS = 8


def run(model):
    torch.manual_seed(0)
    hidden, text = (torch.randn(1, tokens, models.WIDTH) for tokens in (6, 5))
    results = []
    with torch.no_grad():
        for step in range(STEPS):
            hidden = hidden * 0.95
            results.append(model(hidden, torch.tensor([1000.0 - step]), text))
    return torch.stack(results)


def two_loops():
    return make(models.TwoLoops, seed=1, joint=3, single=2)


def enabled(*modifiers, **options):
    return cachedit_fx.enable_cache(
        two_loops(), options.pop("config", BASE), params_modifiers=list(modifiers), inner_backend="eager", **options
    )


def cached(model):
    return [len(region.cached_steps) for region in cachedit_fx.summary(model)]


def test_each_loop_follows_its_own_settings():
    model = enabled(
        ParamsModifier(DBCacheConfig(Fn_compute_blocks=2, max_warmup_steps=4, residual_diff_threshold=1e9)),
        ParamsModifier(BASE.reset(max_cached_steps=3)),
    )
    run(model)
    assert cached(model) == [4, 3]
    assert [region.first for region in cachedit_fx.summary(model)] == [2, 1]


def test_loops_beyond_the_list_share_the_model_s_settings():
    model = enabled(ParamsModifier(max_cached_steps=2))
    run(model)
    assert cached(model) == [2, STEPS - 1]


def test_changes_apply_to_the_shared_config():
    modifier = ParamsModifier(max_warmup_steps=5)
    assert modifier.config(BASE) == BASE.reset(max_warmup_steps=5)
    assert ParamsModifier(DBCacheConfig(), max_warmup_steps=5).config(BASE) == DBCacheConfig(max_warmup_steps=5)


def test_each_loop_has_its_own_calibrator():
    mask = {"steps_computation_mask": "11010100", "steps_computation_policy": "static"}
    config = BASE.reset(**mask)
    plain = run(enabled(ParamsModifier(), ParamsModifier(), config=config))
    first = run(enabled(ParamsModifier(calibrator_config=TaylorSeerCalibratorConfig()), config=config))
    both = run(enabled(config=config, calibrator="taylorseer", scope="loop"))
    assert not torch.equal(plain, first) and not torch.equal(first, both)
    named = [ParamsModifier(calibrator_config="taylorseer")] * 2
    assert torch.equal(run(enabled(*named, config=config)), both)


def test_an_inert_threshold_is_told_with_the_loop_s_own_threshold():
    model = enabled(ParamsModifier(residual_diff_threshold=1e-9))
    run(model)
    with pytest.warns(cachedit_fx.CacheWarning, match="threshold 1e-09"):
        cachedit_fx.summary(model)


def test_a_policy_of_a_loop_is_changed_without_compiling():
    pieces = []

    def inner(gm, inputs):
        pieces.append(gm)
        return gm.forward

    model = two_loops()
    for limit in (1, 3):
        cachedit_fx.enable_cache(
            model, BASE, params_modifiers=[ParamsModifier(max_cached_steps=limit)], inner_backend=inner
        )
        run(model)
        assert cached(model)[0] == limit
        if limit == 1:
            before = len(pieces)
    assert len(pieces) == before


def test_a_pipeline_of_two_transformers_takes_an_entry_for_each():
    class Pipe:
        def __init__(self):
            self.components = {"transformer": two_loops(), "transformer_2": two_loops()}

    pipe = Pipe()
    limits = [ParamsModifier(max_cached_steps=1), [ParamsModifier(max_cached_steps=2), ParamsModifier()]]
    cachedit_fx.enable_cache(pipe, BASE, params_modifiers=limits, inner_backend="eager")
    for module, expected in zip(pipe.components.values(), ([1, 7], [2, 7]), strict=True):
        run(module)
        assert cached(module) == expected
    with pytest.raises(OptionError, match="give a list of 2"):
        cachedit_fx.enable_cache(pipe, BASE, params_modifiers=limits[:1])


def test_more_modifiers_than_loops_are_refused():
    model = enabled(*[ParamsModifier()] * 3)
    with pytest.raises(OptionError, match="3 entries, and the chain 2 block loops: double_blocks, single"):
        run(model)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: parse_options({"params_modifiers": [ParamsModifier()], "scope": "model"}), "need scope='loop'"),
        (lambda: parse_options({"params_modifiers": [ParamsModifier()], "cache": None}), "and a cache"),
        (lambda: parse_options({"params_modifiers": [BASE]}), "a list of ParamsModifier"),
        (lambda: ParamsModifier(max_cached_step=1), "nearest known one is 'max_cached_steps'"),
        (lambda: ParamsModifier(max_cached_steps=-2), "an integer >= -1"),
        (lambda: ParamsModifier(TaylorSeerCalibratorConfig()), "must be a DBCacheConfig"),  # type: ignore[arg-type]
        (lambda: parse_options({"params_modifiers": [ParamsModifier(calibrator_config=LagrangeCalibratorConfig())]}),
         "scope='loop' decides"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make_it, message):
    with pytest.raises(OptionError, match=message):
        make_it()
