"""Every argument of every public call: objects of cache-dit and of no package have their words, and change nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lib.toys import make

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ParamsModifier
from cachedit_fx.runtime.registry import states_of


def other(name: str) -> Any:
    """An object of the package cache_dit, which fails if anything of it is called."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("an object of cache_dit was called")

    return type(name, (), {"__module__": "cache_dit.caching", "apply": fail, "check": fail, "modules": fail})()


CALLS: dict[str, tuple[str, Any]] = {
    "enable_cache, adapter": ("BlockAdapter", lambda each, model: cache_dit.enable_cache(each)),
    "enable_cache, cache_config": ("DBCacheConfig", lambda each, model: cache_dit.enable_cache(model, each)),
    "enable_cache, calibrator_config": (
        "FoCaCalibratorConfig",
        lambda each, model: cache_dit.enable_cache(model, calibrator_config=each),
    ),
    "enable_cache, params_modifiers": (
        "ParamsModifier",
        lambda each, model: cache_dit.enable_cache(model, params_modifiers=[each]),
    ),
    "enable_cache, parallelism_config": (
        "ParallelismConfig",
        lambda each, model: cache_dit.enable_cache(model, DBCacheConfig(), parallelism_config=each),
    ),
    "enable_cache, quantize_config": (
        "QuantizeConfig",
        lambda each, model: cache_dit.enable_cache(model, DBCacheConfig(), quantize_config=each),
    ),
    "enable_cache, attention_backend": (
        "AttnBackend",
        lambda each, model: cache_dit.enable_cache(model, DBCacheConfig(), attention_backend=each),
    ),
    "disable_cache": ("BlockAdapter", lambda each, model: cache_dit.disable_cache(each)),
    "refresh_context": ("BlockAdapter", lambda each, model: cache_dit.refresh_context(each, max_warmup_steps=4)),
    "refresh_context, cache_config": (
        "DBPruneConfig",
        lambda each, model: cache_dit.refresh_context(model, cache_config=each),
    ),
    "summary": ("BlockAdapter", lambda each, model: cache_dit.summary(each)),
    "strify": ("BlockAdapter", lambda each, model: cache_dit.strify(each)),
    "strify, dict": ("DBCacheConfig", lambda each, model: cache_dit.strify({"cache_config": each})),
    "get_adapter": ("BlockAdapter", lambda each, model: cache_dit.get_adapter(each)),
    "set_attn_backend": ("BlockAdapter", lambda each, model: cache_dit.set_attn_backend(each, "sage")),
    "set_attn_backend, name": ("AttnBackend", lambda each, model: cache_dit.set_attn_backend(model, each)),
    "quantize, module": ("BlockAdapter", lambda each, model: cache_dit.quantize(each, quant_type="int8_weight_only")),
    "quantize, config": ("QuantizeConfig", lambda each, model: cache_dit.quantize(model, each)),
    "BlockAdapter, patch_functor": (
        "FluxPatchFunctor",
        lambda each, model: BlockAdapter(transformer=model, patch_functor=each),
    ),
    "BlockAdapter, forward_pattern": (
        "ForwardPattern",
        lambda each, model: BlockAdapter(transformer=model, forward_pattern=each),
    ),
    "BlockAdapter, params_modifiers": (
        "ParamsModifier",
        lambda each, model: BlockAdapter(transformer=model, params_modifiers=[each]),
    ),
    "ParamsModifier, cache_config": ("DBCacheConfig", lambda each, model: ParamsModifier(cache_config=each)),
    "ParamsModifier, calibrator_config": (
        "FoCaCalibratorConfig",
        lambda each, model: ParamsModifier(calibrator_config=each),
    ),
}
"""Call -> the class of cache_dit that a script hands over by mistake, and the call with that object."""


@pytest.mark.parametrize("call", CALLS)
def test_an_object_of_the_other_package_is_named_and_never_used(call):
    name, run = CALLS[call]
    model = make()
    with pytest.raises((ValueError, TypeError), match=f"(?s){name}.*cache_dit.*import it from cachedit_fx.compat"):
        run(other(name), model)
    assert not states_of(model)


@pytest.mark.parametrize("call", CALLS)
def test_any_other_object_has_its_words(call):
    model = make()
    with pytest.raises((ValueError, TypeError)) as error:
        CALLS[call][1](1.5, model)
    assert re.search(r"must be|expected|not allowed", str(error.value)), error.value
    assert not states_of(model)


@pytest.mark.parametrize("call", ["enable_cache, adapter", "disable_cache", "get_adapter", "quantize, module"])
def test_none_is_no_model(call):
    with pytest.raises(TypeError, match="expected .*not NoneType"):
        CALLS[call][1](None, make())


def test_quantize_takes_modules_and_says_so_of_a_pipeline():
    from lib.toy_pipeline import ToyPipeline

    with pytest.raises(TypeError, match="such as pipe.transformer, not ToyPipeline"):
        cache_dit.quantize(ToyPipeline(make()), quant_type="int8_weight_only")  # type: ignore[type-var]


def test_a_missing_component_is_said_before_anything_is_enabled():
    from lib.toy_pipeline import ToyPipeline

    pipe = ToyPipeline(make())
    config = cache_dit.QuantizeConfig("TORCHAO", "int8_weight_only", components_to_quantize=["text_encoder"])
    with pytest.raises(ValueError, match="has no module 'text_encoder'; it has transformer"):
        cache_dit.enable_cache(pipe, DBCacheConfig(), quantize_config=config)
    assert not states_of(pipe.transformer)


def test_the_apply_of_a_patch_functor_is_never_called():
    class Own(cache_dit.PatchFunctor):
        def apply(self, transformer, *_, **__):
            raise AssertionError("patched")

    with pytest.warns(UserWarning, match="Own: cachedit_fx patches nothing"):
        BlockAdapter(transformer=make(), patch_functor=Own())
    with pytest.raises(ValueError, match="patch_functor"):
        BlockAdapter(transformer=torch.nn.Linear(1, 1), patch_functor=cache_dit.PatchFunctor)  # type: ignore[arg-type]
