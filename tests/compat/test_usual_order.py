"""The order of calls in cache-dit's scripts: enable the cache, quantize, compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lib.toy_pipeline import ToyPipeline
from lib.toys import CountingBackend, make, noise

import cachedit_fx.compat as cache_dit
from cachedit_fx import CacheWarning, OptionError

CONFIG: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.99}


def weights(module, kind="weight"):
    return {name: type(child.weight).__name__ for name, child in module.named_modules() if hasattr(child, "weight")}


def run(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(noise())


def replace(pipe, module):
    """As the setters of diffusers' pipelines do."""
    pipe.transformer = pipe.components["transformer"] = module


def test_enable_quantize_compile_keeps_the_cache_and_compiles_once():
    pipe, inner, outer = ToyPipeline(make()), CountingBackend(), CountingBackend()
    module = pipe.transformer
    reference = ToyPipeline(make())
    quantized: Any = cache_dit.quantize(reference.transformer, quant_type="int8_weight_only", exclude_layers=["scale"])
    expected = reference(noise())

    cache_dit.enable_cache(pipe, cache_dit.DBCacheConfig(**CONFIG), inner_backend=inner)
    replace(pipe, cache_dit.quantize(pipe.transformer, quant_type="int8_weight_only", exclude_layers=["scale"]))
    replace(pipe, torch.compile(pipe.transformer, backend=outer))
    with pytest.warns(CacheWarning, match="torch.compile have no effect"):
        cached = pipe(noise())
    pieces = inner.pieces
    assert pieces > 0 and outer.pieces == 0
    (stats,) = cache_dit.summary(pipe, logging=False)
    assert stats.cached_steps and stats.quantize_config and stats.quantize_config.strify() == "int8_weight_only"
    assert torch.equal(pipe(noise()), cached) and inner.pieces == pieces
    assert not torch.equal(cached, expected)
    assert weights(module) == weights(quantized)
    assert weights(module)["blocks.0.up"] == "Int8Tensor" and weights(module)["blocks.0.scale"] == "Parameter"

    cache_dit.disable_cache(pipe)
    assert pipe.transformer is module and module._compiled_call_impl is None
    assert torch.equal(pipe(noise()), expected)


def test_compiling_the_blocks_compiles_nothing_more():
    """As `compile_repeated_blocks` of diffusers does."""
    pipe, outer = ToyPipeline(make()), CountingBackend()
    cache_dit.enable_cache(pipe, cache_dit.DBCacheConfig(**CONFIG), inner_backend="eager")
    for block in pipe.transformer.blocks:
        block.compile(backend=outer)
    pipe(noise())
    assert cache_dit.summary(pipe, logging=False)[0].cached_steps and outer.pieces == 0


@pytest.mark.budget(120, "inductor compiles")
@pytest.mark.full("peers")
def test_the_usual_order_with_inductor():
    pipe = ToyPipeline(make(width=32))
    cache_dit.enable_cache(pipe, cache_dit.DBCacheConfig(**CONFIG))
    replace(pipe, cache_dit.quantize(pipe.transformer, quant_type="float8_weight_only"))
    replace(pipe, torch.compile(pipe.transformer))
    latents = noise(width=32)
    pipe.texts = (noise(1, 3, width=32),)
    with pytest.warns(CacheWarning, match="torch.compile have no effect"):
        first = pipe(latents)
    assert torch.allclose(pipe(latents), first) and cache_dit.summary(pipe, logging=False)[0].cached_steps


@pytest.mark.parametrize("kind", ["float8_weight_only", "int8", "int8_weight_only", "int4", "int4_weight_only"])
def test_types_that_run_on_a_cpu(kind):
    module = make(width=32)
    plain = [noise(width=32), torch.tensor([500.0]), noise(1, 3, width=32)]
    expected = module(*plain)
    assert cache_dit.quantize(module, quant_type=kind) is module
    assert torch.allclose(module(*plain), expected, atol=0.5) and not torch.equal(module(*plain), expected)


def test_a_config_chooses_layers():
    module = make()
    config = cache_dit.QuantizeConfig(
        quant_type="int8_weight_only", exclude_layers=["time"], precision_plan={"text": "float8_weight_only"}
    )
    module._repeated_blocks = ["Block"]
    kinds = weights(cache_dit.quantize(module, config))
    assert (kinds["blocks.1.text"], kinds["blocks.1.down"]) == ("Float8Tensor", "Int8Tensor")
    assert kinds["embed"] == kinds["out"] == kinds["time"] == "Parameter"
    whole = weights(cache_dit.quantize(make(), quant_type="int8_weight_only", filter_fn=lambda _, name: name == "out"))
    assert [name for name, kind in whole.items() if kind == "Int8Tensor"] == ["out"]


def test_components_of_a_pipeline():
    pipe = ToyPipeline(make())
    pipe.components["text_encoder"] = encoder = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = cache_dit.QuantizeConfig(
        components_to_quantize={"transformer": {"quant_type": "int8_weight_only"}, "text_encoder": {}},
        quant_type="float8_weight_only",
    )
    assert config.strify() == "<transformer:int8_weight_only><text_encoder:float8_weight_only>"
    cache_dit.enable_cache(pipe, quantize_config=config)
    assert weights(encoder) == {"0": "Float8Tensor"} and weights(pipe.transformer)["out"] == "Int8Tensor"
    (stats,) = cache_dit.summary(pipe, logging=False)
    assert not stats.cache_options and cache_dit.strify(stats) == "int8_weight_only"
    missing = cache_dit.QuantizeConfig(components_to_quantize=["text_encoder_2"])
    with pytest.raises(OptionError, match="no module 'text_encoder_2'; it has transformer, text_encoder"):
        cache_dit.enable_cache(pipe, quantize_config=missing)


@pytest.mark.parametrize("kind", ["svdq_int4_r32", "svdq"])
def test_types_without_kernels_raise_before_a_weight_moves(kind):
    module = make()
    with pytest.raises(NotImplementedError, match="these types work: float8_per_row"):
        cache_dit.quantize(module, quant_type=kind)
    assert set(weights(module).values()) == {"Parameter"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "int3"}, "quant_type='int3' is not allowed"),
        ({"quant_typ": "int8"}, "'quant_type'"),
        ({"quant_type": "nvfp4"}, "compute capability 10.0"),
        ({"quant_type": "float8_per_block"}, "compute capability 8.9"),
        ({"quant_type": "float8"}, "does not run here: it needs an NVIDIA GPU"),
        ({"precision_plan": {"to_q": "int3"}}, "precision_plan='int3' is not allowed"),
        ({"backend": "bitsandbytes"}, "unknown option 'bitsandbytes'"),
    ],
)
def test_bad_settings_have_their_words(settings, words):
    if "NVIDIA GPU" in words and torch.cuda.is_available():
        pytest.skip("float8 runs on this GPU")
    with pytest.raises(OptionError) as error:
        cache_dit.quantize(make(), **settings)
    assert words in str(error.value)


def test_a_config_can_be_updated():
    config = cache_dit.QuantizeConfig().update(quant_type="INT8", backend="ao")
    assert config.as_dict()["quant_type"] == "int8_per_row" and config.backend is cache_dit.QuantizeBackend.TORCHAO
    with pytest.raises(OptionError, match="'quant_type'"):
        config.update(quant_tipe="int8")
