"""Others in our place: `module.compile()` after `enable_cache`, and what `torch.compile` returned, disabled."""

from typing import Any

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from lib.toy_pipeline import ToyPipeline
from lib.toys import FALLING, CountingBackend, Toy, denoise, noise
from lib.toys import make_small as make

from cachedit_fx import CacheWarning, DBCacheConfig, disable_cache, enable_cache, refresh_context, summary

ALWAYS = DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9)
OPTIONS: dict[str, Any] = {"cache": ALWAYS, "inner_backend": "eager"}


class Mixed(Toy, CacheMixin):
    """Has diffusers' `cache_context`, as the transformers of diffusers have."""


def enabled(kind=Toy):
    return enable_cache(make(kind), ALWAYS, inner_backend="eager")


def test_compile_after_enabling_is_undone_when_torch_compiles():
    model = enabled()
    expected = denoise(model)
    model.compile(backend="eager")
    with pytest.warns(CacheWarning, match="Toy.compile.. was called after the cache was enabled"):
        model(noise(), torch.tensor([900.0]), noise(1, 3))
    assert torch.equal(denoise(model), expected)
    assert summary(model)[0].executed_steps == len(FALLING) and summary(model)[0].cached_steps


@pytest.mark.parametrize("ask", [summary, refresh_context])
def test_compile_after_enabling_is_undone_when_anyone_asks(ask):
    model = enabled()
    expected = denoise(model)
    model.compile(backend="eager")
    with pytest.warns(CacheWarning, match="put back"):
        ask(model)
    assert torch.equal(denoise(model), expected) and summary(model)[0].cached_steps


def test_compile_after_enabling_is_undone_before_a_named_call():
    model = enabled(Mixed)
    expected = denoise(model)
    model.compile(backend="eager")
    replaced = model._compiled_call_impl
    with pytest.warns(CacheWarning, match="put back"), model.cache_context("cond"):
        assert model._compiled_call_impl is not replaced
    refresh_context(model)
    assert torch.equal(denoise(model), expected) and summary(model)[0].cached_steps


def test_disabling_what_torch_compile_returned():
    module = make()
    plain = denoise(module)
    compiled = torch.compile(module, backend="cachedit", options=OPTIONS)
    cached = denoise(compiled)
    assert not torch.equal(cached, plain)
    assert disable_cache(compiled) is compiled
    assert torch.equal(denoise(compiled), plain) and torch.equal(denoise(module), plain)
    again = torch.compile(module, backend="cachedit", options=OPTIONS)
    assert torch.equal(denoise(again), cached)


def test_disabling_a_pipeline_gives_its_module_back():
    pipe = ToyPipeline(make())
    module, image = pipe.transformer, noise()
    plain = pipe(image)
    pipe.transformer = torch.compile(module, backend="cachedit", options=OPTIONS)
    pipe.components["transformer"] = pipe.transformer
    assert not torch.equal(pipe(image), plain)
    disable_cache(pipe)
    assert pipe.transformer is module and torch.equal(pipe(image), plain)


def test_torch_compile_after_enabling_keeps_the_cache_and_compiles_nothing_more():
    model = enabled()
    expected = denoise(model)
    refresh_context(model)
    counting = CountingBackend()
    shell: Any = torch.compile(model, backend=counting)
    assert torch.equal(denoise(shell), expected)
    assert counting.pieces == 0 and summary(shell)[0].cached_steps


def test_torch_compile_on_an_enabled_module_says_that_its_options_have_no_effect():
    shell: Any = torch.compile(enabled(), backend="eager", fullgraph=True)
    with pytest.warns(CacheWarning, match="torch.compile have no effect"):
        denoise(shell)


def test_torch_compile_on_an_enabled_module_can_be_enabled_again_and_disabled():
    pipe = ToyPipeline(make())
    module, image = pipe.transformer, noise()
    plain = pipe(image)
    enable_cache(pipe, ALWAYS, inner_backend="eager")
    pipe.transformer = pipe.components["transformer"] = shell = torch.compile(module, backend="eager")
    with pytest.warns(CacheWarning, match="torch.compile have no effect"):
        pipe(image)
    enable_cache(pipe, ALWAYS.reset(max_warmup_steps=3), inner_backend="eager")
    pipe(image)
    assert summary(pipe)[0].cached_steps == list(range(3, 8))
    disable_cache(pipe)
    assert pipe.transformer is module and torch.equal(pipe(image), plain)
    assert torch.equal(shell(image, torch.ones(1), noise(1, 3)), module(image, torch.ones(1), noise(1, 3)))


def test_disabling_leaves_other_backends_alone():
    module = make()
    compiled: Any = torch.compile(module, backend="eager")
    forward = compiled.forward
    disable_cache(compiled)
    assert compiled.forward is forward


def test_a_reset_by_diffusers_ends_the_generation():
    """Pipelines reset stateful hooks at their end."""
    model = enabled(Mixed)
    expected = denoise(model, FALLING[2:])
    refresh_context(model)
    denoise(model, FALLING[:1])
    model._reset_stateful_cache()
    assert torch.equal(denoise(model, FALLING[2:]), expected)
    assert summary(model)[0].cached_steps == list(range(1, len(FALLING) - 2))


def test_disabling_what_module_compile_compiled():
    module = make()
    plain = denoise(module)
    module.compile(backend="cachedit", options=OPTIONS)
    assert not torch.equal(denoise(module), plain)
    disable_cache(module)
    assert torch.equal(denoise(module), plain)
