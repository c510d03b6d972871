"""Calls in odd but valid orders, and settings in every place that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lib.models import TwoLoops
from lib.models import inputs as two_loops_inputs
from lib.toys import FALLING, Toy, denoise, make, noise

import cachedit_fx
import cachedit_fx.compat as cache_dit
from cachedit_fx import OptionError
from cachedit_fx.compat import BlockAdapter, BlockAdapterRegister, DBCacheConfig, DBPruneConfig, ParamsModifier
from cachedit_fx.runtime.registry import states_of
from cachedit_fx.runtime.warning import SettingWarning

EAGER: dict[str, Any] = {"inner_backend": "eager"}
ALWAYS: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
STEPS = len(FALLING)


def own_options(model) -> Any:
    return states_of(model)[0].options


def enabled(**more) -> Toy:
    model = make()
    cache_dit.enable_cache(model, DBCacheConfig(**ALWAYS), **more, **EAGER)
    return model


def cached_steps(model) -> list[int]:
    return cache_dit.summary(model, logging=False)[0].cached_steps


def test_a_second_call_without_a_cache_type_switches_the_cache_off():
    model = enabled()
    cache_dit.enable_cache(model, DBCacheConfig(cache_type=cache_dit.NONE))
    assert not states_of(model) and cache_dit.strify(model) == ""
    model = enabled()
    cache_dit.enable_cache(model, attention_backend="native")  # says nothing of the cache, which stays
    assert states_of(model)


def test_flat_settings_change_the_config_that_comes_with_them():
    model = make()
    config = DBCacheConfig(max_warmup_steps=3)
    flat: dict[str, Any] = {"cache_type": "DBPrune", "non_prune_block_ids": [1], "force_reduce_calibrator_vram": True}
    cache_dit.enable_cache(model, config, **flat, enable_taylorseer=True, **EAGER)
    options = own_options(model)
    assert options.cache == cachedit_fx.DBPruneConfig(max_warmup_steps=3, non_prune_block_ids=(1,))
    assert options.calibrator == cachedit_fx.TaylorSeerCalibratorConfig(calibrator_state_dtype="model")
    assert config == DBCacheConfig(max_warmup_steps=3)
    cache_dit.enable_cache(model, steps_computation_mask="fast", num_inference_steps=8, **EAGER)
    assert own_options(model).cache.steps_computation_mask == tuple(
        cache_dit.steps_mask(mask_policy="fast", total_steps=8)
    )


def test_refresh_takes_what_load_configs_returns():
    model = enabled(calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2))
    configs = cache_dit.load_configs({"cache_config": {"max_warmup_steps": 5}}, reset=True)
    cache_dit.refresh_context(model, **configs)
    assert own_options(model).cache == cachedit_fx.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=5, residual_diff_threshold=float("inf")
    )
    assert own_options(model).calibrator == cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=2)
    with pytest.warns(SettingWarning, match="attention_backend has no effect in refresh_context"):
        cache_dit.refresh_context(model, attention_backend="sage")


def test_refresh_takes_a_kind_a_mask_and_a_calibrator_by_name():
    model = enabled()
    cache_dit.refresh_context(model, steps_computation_mask="fast", num_inference_steps=STEPS)
    mask = tuple(cache_dit.steps_mask(mask_policy="fast", total_steps=STEPS))
    assert own_options(model).cache.steps_computation_mask == mask
    cache_dit.refresh_context(model, cache_type="DBPrune", enable_foca=True)
    assert own_options(model).cache == cachedit_fx.DBPruneConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        residual_diff_threshold=float("inf"),
        steps_computation_mask=mask,
        num_inference_steps=STEPS,
    )
    off = cache_dit.FoCaCalibratorConfig(enable_calibrator=False)
    cache_dit.refresh_context(model, cache_config=DBPruneConfig(), calibrator_config=off)
    assert own_options(model).calibrator == cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=0)
    with pytest.raises(OptionError, match="use disable_cache"):
        cache_dit.refresh_context(model, cache_config=DBCacheConfig(cache_type=cache_dit.NONE))


def test_an_entry_has_the_settings_of_its_own_list():
    torch.manual_seed(0)
    model = TwoLoops()
    modifiers = [ParamsModifier(Fn_compute_blocks=8), ParamsModifier(max_warmup_steps=1)]
    cache_dit.enable_cache(model, DBCacheConfig(**ALWAYS), params_modifiers=modifiers, **EAGER)
    with torch.no_grad():
        for timestep in (900.0, 700.0, 500.0):
            model(*two_loops_inputs(timestep=timestep), noise(1, 3, two_loops_inputs()[0].shape[-1]))
    (entry,) = cache_dit.summary(model, logging=False)
    assert entry.cached_steps == [1, 2]
    assert entry.cache_options["cache_config"].max_warmup_steps == 1


def test_a_slice_of_a_list_raises_first_and_last_blocks():
    model = make()  # six blocks
    adapter = BlockAdapter(transformer=model, blocks=model.blocks[2:5])
    cache_dit.enable_cache(adapter, DBCacheConfig(**ALWAYS), **EAGER)
    denoise(model)
    (own,) = cachedit_fx.summary(model)
    assert (own.first, own.num_blocks, own.last) == (3, 6, 1) and own.cached_steps == list(range(2, STEPS))
    cache_dit.refresh_context(model, cache_config=DBCacheConfig(**ALWAYS | {"Bn_compute_blocks": 1}))
    denoise(model)
    assert (cachedit_fx.summary(model)[0].first, cachedit_fx.summary(model)[0].last) == (3, 2)
    modifier = ParamsModifier(Fn_compute_blocks=2, Bn_compute_blocks=0)
    cache_dit.enable_cache(adapter, DBCacheConfig(**ALWAYS), params_modifiers=modifier, **EAGER)
    denoise(model)
    assert (cachedit_fx.summary(model)[0].first, cachedit_fx.summary(model)[0].last) == (4, 1)
    whole = BlockAdapter(transformer=model, blocks=model.blocks[:])
    cache_dit.enable_cache(whole, DBCacheConfig(**ALWAYS), **EAGER)
    denoise(model)
    assert (cachedit_fx.summary(model)[0].first, cachedit_fx.summary(model)[0].last) == (1, 0)
    cache_dit.refresh_context(model, Fn_compute_blocks=2)
    denoise(model)
    assert cachedit_fx.summary(model)[0].first == 2


def test_an_adapter_gives_the_module_back_in_place_of_what_torch_compile_returned():
    from lib.toy_pipeline import ToyPipeline

    model = make()
    pipe = ToyPipeline(model)
    adapter = BlockAdapter(pipe=pipe, transformer=model, blocks=model.blocks)
    cache_dit.enable_cache(adapter, DBCacheConfig(**ALWAYS), **EAGER)
    pipe.transformer = pipe.components["transformer"] = torch.compile(model, backend="eager")
    cache_dit.disable_cache(adapter)
    assert pipe.transformer is model and model._compiled_call_impl is None


def test_a_list_is_named_once():
    model = make()
    for both in ([model.blocks, model.blocks], [model.blocks[:3], model.blocks[3:]]):
        with pytest.raises(OptionError, match="blocks is there twice"):
            BlockAdapter(transformer=model, blocks=both)


@pytest.mark.parametrize("pick", [slice(0, 6, 2), slice(None, None, -1), slice(2, 2)])
def test_other_picks_of_blocks_are_errors(pick):
    model = make()
    with pytest.raises(OptionError, match="neighbours"):
        BlockAdapter(transformer=model, blocks=model.blocks[pick])


def test_a_function_for_a_transformers_name_gets_an_object_with_the_transformer():
    class Special(Toy):
        pass

    order = []

    def register(name):
        @BlockAdapterRegister.register(name)
        def adapter(pipe, **arguments):
            order.append(name)
            return BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.blocks, **arguments)

    before = dict(BlockAdapterRegister._adapters)
    try:
        for name in ("Spec", "Special", "Spec"):
            register(name)
        model = make(Special)
        cache_dit.enable_cache(model, DBCacheConfig(**ALWAYS), **EAGER)
        denoise(model)
        assert cached_steps(model) == list(range(2, STEPS))
        assert {*order} == {"Spec"}  # registered last
        cache_dit.disable_cache(model)
        assert not states_of(model)
    finally:
        BlockAdapterRegister._adapters.clear()
        BlockAdapterRegister._adapters.update(before)


def test_a_layer_is_quantized_once():
    model = make()
    cache_dit.quantize(model, quant_type="int8_weight_only", exclude_layers=["blocks.0"])
    with pytest.warns(SettingWarning, match="quantized already"):
        cache_dit.quantize(model, quant_type="float8_weight_only", exclude_layers=[])
    kinds = {type(part.weight.detach()).__name__ for part in model.modules() if isinstance(part, torch.nn.Linear)}
    assert kinds == {"Int8Tensor", "Float8Tensor"}
