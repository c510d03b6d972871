"""cache-dit's configs: mutable, checked, and translated into ours."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

import cachedit_fx
import cachedit_fx.compat as cache_dit
from cachedit_fx import OptionError
from cachedit_fx.compat.modifiers import own_modifier
from cachedit_fx.compat.translation import (
    calibrator_config_of,
    config_of,
    own_cache_config,
    own_calibrator_config,
)


def ANY(value) -> Any:
    """Hides a wrong type from the type checker."""
    return value


def test_the_defaults_are_ours():
    assert own_cache_config(cache_dit.DBCacheConfig()) == cachedit_fx.DBCacheConfig()
    assert own_cache_config(cache_dit.DBPruneConfig()) == cachedit_fx.DBPruneConfig()
    assert own_calibrator_config(cache_dit.TaylorSeerCalibratorConfig()) == cachedit_fx.TaylorSeerCalibratorConfig()
    assert own_calibrator_config(cache_dit.FoCaCalibratorConfig()) == cachedit_fx.FoCaCalibratorConfig()
    assert own_cache_config(None) is None
    assert own_calibrator_config(None) is None


def test_reset_leaves_the_given_fields_alone():
    config = cache_dit.DBCacheConfig()
    assert config.reset(max_warmup_steps=4, residual_diff_threshold=0.2) is config
    assert config.settings() == {
        "cache_type": cache_dit.DBCache,
        "max_warmup_steps": 4,
        "residual_diff_threshold": 0.2,
    }
    assert config.Fn_compute_blocks is None and own_cache_config(config) == cachedit_fx.DBCacheConfig(
        max_warmup_steps=4, residual_diff_threshold=0.2
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig().empty(taylorseer_order=2)
    assert calibrator.calibrator_type == "taylorseer" and calibrator.enable_calibrator is None


def test_update_ignores_none_and_changes_in_place():
    config = cache_dit.DBCacheConfig()
    config.Fn_compute_blocks = 2
    assert config.update(max_warmup_steps=None, Bn_compute_blocks=1) is config
    assert config.as_dict()["max_warmup_steps"] == 8
    assert own_cache_config(config) == cachedit_fx.DBCacheConfig(Fn_compute_blocks=2, Bn_compute_blocks=1)


@pytest.mark.parametrize("mask", [[1, 1, 0, 1], (1, 1, 0, 1), "1101"])
def test_masks_in_every_form(mask):
    config = own_cache_config(cache_dit.DBCacheConfig(steps_computation_mask=mask))
    assert config is not None and config.steps_computation_mask == (1, 1, 0, 1)


def test_every_setting_of_pruning_is_translated():
    config = cache_dit.DBPruneConfig(
        enable_dynamic_prune_threshold=True,
        max_dynamic_prune_threshold=0.3,
        dynamic_prune_threshold_relax_ratio=1.5,
        non_prune_block_ids=list(range(2, 4)),
        force_reduce_calibrator_vram=True,
    )
    assert own_cache_config(config) == cachedit_fx.DBPruneConfig(
        enable_dynamic_prune_threshold=True,
        max_dynamic_prune_threshold=0.3,
        dynamic_prune_threshold_relax_ratio=1.5,
        non_prune_block_ids=(2, 3),
    )
    calibrator = own_calibrator_config(cache_dit.FoCaCalibratorConfig(), config)
    assert calibrator == cachedit_fx.FoCaCalibratorConfig(calibrator_state_dtype="model")


def test_a_threshold_may_be_a_tensor_and_means_always_from_one_on():
    config = own_cache_config(cache_dit.DBCacheConfig(residual_diff_threshold=ANY(torch.tensor(0.25))))
    assert config is not None and config.residual_diff_threshold == 0.25
    always = own_cache_config(cache_dit.DBCacheConfig(residual_diff_threshold=1.0))
    assert always is not None
    assert always.residual_diff_threshold == math.inf
    assert config_of(always).residual_diff_threshold == 1.0


def test_a_config_comes_back_with_its_settings():
    for config in (
        cache_dit.DBCacheConfig(Fn_compute_blocks=2, num_inference_steps=9),
        cache_dit.DBPruneConfig(max_warmup_steps=3),
    ):
        own = own_cache_config(config)
        assert own is not None and own_cache_config(config_of(own)) == own
    order = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert calibrator_config_of(own_calibrator_config(order)) == order
    assert calibrator_config_of(cachedit_fx.LagrangeCalibratorConfig()) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: cache_dit.DBCacheConfig(residual_diff_threshold=ANY("abc")),
            "residual_diff_threshold='abc' is not allowed",
        ),
        (lambda: cache_dit.DBCacheConfig().update(max_warm_up_steps=4), "nearest known one is 'max_warmup_steps'"),
        (lambda: cache_dit.DBCacheConfig().reset(Fn_compute_blocks=-1), "an integer >= 0"),
        (lambda: cache_dit.DBCacheConfig(steps_computation_policy="statik"), "did you mean 'static'"),
        (lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=ANY("two")), "taylorseer_order='two'"),
        (lambda: cache_dit.FoCaCalibratorConfig(calibrator_cache_type="residuals"), "did you mean 'residual'"),
        (lambda: cache_dit.TaylorSeerCalibratorConfig().update(order=2), "'taylorseer_order'"),
        (lambda: cache_dit.ParamsModifier(max_warm_up=4), "'max_warmup_steps'"),
        (
            lambda: own_cache_config(ANY({"max_warmup_steps": 4})),
            "must be a DBCacheConfig or DBPruneConfig of cachedit_fx",
        ),
        (lambda: own_modifier("F8"), "must be a ParamsModifier"),
        (lambda: own_calibrator_config(cache_dit.CalibratorConfig(True, calibrator_type="taylor")), "'taylorseer'"),
        (lambda: cache_dit.cache_type("DBCash"), "DBCache"),
        (lambda: cache_dit.DBCacheConfig(ANY(1)), "cache_type=1 is not allowed"),
    ],
)
def test_bad_values_have_their_words(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert words in str(error.value)


def test_objects_of_the_other_package_are_recognised():
    other = type("DBCacheConfig", (), {"__module__": "cache_dit.caching"})()
    for translate in (own_cache_config, own_calibrator_config, own_modifier):
        with pytest.raises(OptionError, match="of the package cache_dit; import it from cachedit_fx.compat"):
            translate(other)


def test_calibrators_that_are_off():
    assert own_calibrator_config(cache_dit.TaylorSeerCalibratorConfig(False, False)) is None


def test_dmd_has_cache_dits_history_and_rank():
    own = own_calibrator_config(cache_dit.DMDCalibratorConfig(dmd_rank=2))
    assert own == cachedit_fx.DMDCalibratorConfig(dmd_history=6, dmd_rank=2)


def test_our_own_configs_pass_through():
    own = cachedit_fx.LagrangeCalibratorConfig()
    assert own_calibrator_config(own) is own
    config = cachedit_fx.DBCacheConfig(2)
    assert own_cache_config(config) is config


def test_modifiers_change_what_they_name():
    modifier = own_modifier(cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig().reset(max_warmup_steps=4)))
    assert modifier == cachedit_fx.ParamsModifier(max_warmup_steps=4)
    flat = cache_dit.ParamsModifier(max_cached_steps=3, enable_taylorseer=True, taylorseer_order=2)
    assert own_modifier(flat) == cachedit_fx.ParamsModifier(
        None, cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=2), max_cached_steps=3
    )
    both = cache_dit.ParamsModifier(cache_dit.DBCacheConfig().reset(max_warmup_steps=4), max_cached_steps=3)
    assert own_modifier(both) == cachedit_fx.ParamsModifier(max_warmup_steps=4, max_cached_steps=3)


def test_short_names():
    assert cache_dit.DBCacheConfig().strify() == "DBCache_F8B0_W8I1M0MC0_R0.08"
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=2,
        residual_diff_threshold=0.12,
        max_cached_steps=7,
        steps_computation_mask=[1, 0],
        enable_separate_cfg=True,
        num_inference_steps=2,
    )
    config.force_refresh_step_hint = 1
    assert config.strify() == "DBCache_F1B2_W8I1M7MC0_R0.12_SCM10_dynamic_N2_FR1_once_CFG1"
    assert cache_dit.DBPruneConfig(max_continuous_cached_steps=3).strify() == "DBPrune_F8B0_W8I1M0MC3_R0.08"
    calibrators = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2), cache_dit.FoCaCalibratorConfig()
    assert [each.strify() for each in calibrators] == ["T1O2", "FoCa"]
    assert [each.strify(details=True) for each in calibrators] == ["TaylorSeer_O(2)", "FoCa"]
    dmd = cache_dit.DMDCalibratorConfig(dmd_svd_precision="low")
    assert (dmd.strify(), dmd.strify(details=True)) == ("DMDH6l", "DMD_H(6, low)")
    assert dmd.to_kwargs() == {"history": 6, "rank": 0, "ridge": 1e-8, "svd_precision": "low"}


def test_cache_types_and_block_ranges():
    assert [cache_dit.cache_type(name) for name in ("db_cache", "DBP", None)] == [
        cache_dit.DBCache,
        cache_dit.DBPrune,
        cache_dit.NONE,
    ]
    assert str(cache_dit.DBCache) == "DBCache" and cache_dit.CacheType.type("nc") is cache_dit.NONE
    assert cache_dit.block_range(4, 10, 3) == [0, 4, 7, 9] and cache_dit.block_range(0, 10) == []


def test_the_module_is_a_drop_in_for_import_as():
    assert isinstance(cache_dit, types.ModuleType) and sys.modules["cachedit_fx.compat"] is cache_dit
    with pytest.raises(AttributeError, match="no attribute 'enable_cash'"):
        cache_dit.enable_cash  # noqa: B018


def test_every_field_of_every_config_is_checked_when_it_is_set():
    configs = [cache_dit.DBCacheConfig, cache_dit.DBPruneConfig, cache_dit.CalibratorConfig]
    configs += [cache_dit.TaylorSeerCalibratorConfig, cache_dit.FoCaCalibratorConfig, cache_dit.DMDCalibratorConfig]
    for config_class in configs:
        for name in (each.name for each in fields(config_class)):
            for set_value in (
                lambda value, name=name, make=config_class: make(**{name: value}),
                lambda value, name=name, make=config_class: make().update(**{name: value}),
                lambda value, name=name, make=config_class: setattr(make(), name, value),
            ):
                with pytest.raises(OptionError, match=name):
                    set_value(object())
        with pytest.raises(OptionError, match="unknown option 'max_warm_up'"):
            config_class().max_warm_up = 4


@pytest.mark.parametrize("name", cache_dit.QuantizeConfig.__dataclass_fields__)
def test_every_field_of_a_quantize_config_is_checked(name):
    for call in (cache_dit.QuantizeConfig, cache_dit.QuantizeConfig().update):
        with pytest.raises(OptionError, match=f"(?i){name}"):
            call(**ANY({name: object()}))
    config = cache_dit.QuantizeConfig()
    setattr(config, name, object())
    with pytest.raises(OptionError, match=f"(?i){name}"):
        cache_dit.quantize(torch.nn.Linear(2, 2), config)


def test_a_cache_type_may_be_assigned_by_name():
    config = cache_dit.DBCacheConfig()
    config.cache_type = ANY("db_prune")
    assert own_cache_config(config) == cachedit_fx.DBPruneConfig()
    config.cache_type = ANY("none")
    assert own_cache_config(config) is None


def test_a_bad_value_in_an_update_changes_nothing():
    config = cache_dit.DBCacheConfig()
    with pytest.raises(OptionError):
        config.update(max_warmup_steps=3, Fn_compute_blocks=-1)
    assert config == cache_dit.DBCacheConfig()


@pytest.mark.parametrize("mask", [torch.tensor([1, 1, 0, 1]), np.array([1, 1, 0, 1])])
def test_masks_may_be_tensors(mask):
    own = own_cache_config(cache_dit.DBCacheConfig(steps_computation_mask=mask))
    assert own is not None and own.steps_computation_mask == (1, 1, 0, 1)


def test_a_name_in_place_of_a_mask_says_where_names_work():
    with pytest.raises(OptionError, match="steps_computation_mask='fast'.*steps_mask"):
        cache_dit.DBCacheConfig(steps_computation_mask=ANY("fast"))


def test_enable_calibrator_decides_alone_and_none_is_the_default():
    assert own_calibrator_config(cache_dit.TaylorSeerCalibratorConfig(enable_calibrator=False)) is None
    own = own_calibrator_config(cache_dit.TaylorSeerCalibratorConfig().reset(taylorseer_order=2))
    assert own == cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert own_calibrator_config(cache_dit.CalibratorConfig().reset()) is None


def test_a_modifiers_calibrator_changes_the_shared_one_or_switches_it_off():
    shared = cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=3, calibrator_cache_type="hidden_states")
    part = cache_dit.ParamsModifier(calibrator_config=cache_dit.TaylorSeerCalibratorConfig().reset(taylorseer_order=2))
    own = own_modifier(part, None, shared)
    assert own.calibrator_config == cachedit_fx.TaylorSeerCalibratorConfig(
        taylorseer_order=2, calibrator_cache_type="hidden_states"
    )
    off = cache_dit.ParamsModifier(calibrator_config=cache_dit.TaylorSeerCalibratorConfig(False))
    assert own_modifier(off, None, shared).calibrator_config == cachedit_fx.TaylorSeerCalibratorConfig(
        taylorseer_order=0
    )


def test_a_modifier_may_be_of_another_kind():
    shared = cachedit_fx.DBCacheConfig(max_warmup_steps=3)
    modifier = cache_dit.ParamsModifier(cache_dit.DBPruneConfig().reset(non_prune_block_ids=[1]))
    assert own_modifier(modifier, shared).config(shared) == cachedit_fx.DBPruneConfig(
        max_warmup_steps=3, non_prune_block_ids=(1,)
    )
    common = cache_dit.ParamsModifier(cache_dit.DBCacheConfig().reset(max_warmup_steps=4))
    prunes = cachedit_fx.DBPruneConfig(non_prune_block_ids=(1,))
    assert own_modifier(common, prunes).config(prunes) == prunes.reset(max_warmup_steps=4)
    with pytest.raises(OptionError, match="BlockAdapter"):
        own_modifier(cache_dit.ParamsModifier(cache_dit.DBCacheConfig(cache_type=cache_dit.NONE)), shared)


def test_a_modifier_takes_what_load_configs_returns():
    configs = cache_dit.load_configs({"max_warmup_steps": 3}, reset=True)
    assert own_modifier(cache_dit.ParamsModifier(**configs)) == cachedit_fx.ParamsModifier(max_warmup_steps=3)


def test_layers_blocks_and_components_may_be_one_name():
    config = cache_dit.QuantizeConfig(
        exclude_layers=ANY("embed"), repeated_blocks=ANY("Block"), components_to_quantize=ANY("transformer")
    )
    assert config.exclude_layers == ["embed"] and config.repeated_blocks == ["Block"]
    assert config.components_to_quantize == ["transformer"] and [*config.by_component()] == ["transformer"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"components_to_quantize": {"transformer": {"quant_typ": "int8"}}}, "nearest known one is 'quant_type'"),
        ({"components_to_quantize": {"transformer": 3}}, "components_to_quantize"),
        ({"precision_plan": {"up": "int9"}}, "precision_plan='int9' is not allowed"),
        ({"backend": 3}, "unknown option '3'"),
    ],
)
def test_what_a_quantize_config_holds_is_checked_too(settings, words):
    with pytest.raises(OptionError) as error:
        cache_dit.QuantizeConfig(**settings).by_component()
    assert words in str(error.value)
    with pytest.raises(OptionError, match="unknown option '3'"):
        cache_dit.ParallelismConfig(backend=ANY(3))


def test_a_config_may_have_a_subclass_with_more_fields():
    @dataclass
    class Noted(cache_dit.DBCacheConfig):
        note: str = ""

    assert own_cache_config(Noted(max_warmup_steps=4, note="mine")) == cachedit_fx.DBCacheConfig(max_warmup_steps=4)
