"""What people put around a transformer: precision, grad modes, quantized linears, checkpointing, saving and copying.

LoRA is in test_lora.py, offloading in test_offload.py, what a call is handed in test_model_inputs.py."""

import contextlib
import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from lib import models
from lib.marks import only_in
from lib.toys import Timeless, Toy, make, noise
from lib.wrapped import (
    COMPUTES,
    REUSES,
    SKIPS,
    TIMES,
    InTuple,
    call,
    check,
    check_next_generation,
    enabled,
    generation,
    plain,
    steps,
    toy,
    toy_inputs,
)
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import cachedit_fx
from cachedit_fx import CacheWarning, disable_cache, refresh_context, summary

pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache")
BF16: Any = {"device_type": "cpu", "dtype": torch.bfloat16}


def flux(**shape):
    return models.flux(double=2, single=2, **shape)


# ---------------------------------------------------------------------------------------------------------------------
# precision


def test_autocast_around_the_call():
    model, inputs = flux()
    full = check(model, inputs)
    with torch.autocast(**BF16):
        half = check(model, inputs)
    assert torch.allclose(half.float(), full, atol=0.1) and not torch.equal(half.float(), full)


def test_autocast_comes_and_goes_from_generation_to_generation():
    model, inputs = toy()
    enabled(model, SKIPS)
    expected = generation(model, inputs)
    with torch.autocast(**BF16):
        assert not torch.equal(check_next_generation(model, inputs), expected)
    assert torch.equal(check_next_generation(model, inputs), expected)


class InBlocks(InTuple):
    """Every block opens autocast for itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for block in self.blocks:
            block.forward = torch.autocast(**BF16)(block.forward)


class Throughout(Toy):
    """The whole forward stands under autocast."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        with torch.autocast(**BF16):
            return (super().forward(hidden_states, timestep, encoder_hidden_states),)


def test_autocast_in_each_block():
    found = check(make(InBlocks), toy_inputs())
    assert not torch.equal(found, call(make(InTuple), toy_inputs()))


def test_autocast_around_the_loop_is_uncached_and_says_so_once():
    model, inputs = make(Throughout), toy_inputs()
    expected = plain(model, inputs)
    enabled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(torch.equal(call(model, inputs), expected) for _ in range(3))
    (message,) = [str(item.message) for item in caught if item.category is CacheWarning]
    assert "autocast" in message and steps(model) == [(0, [], 3)]


def as_bfloat16(inputs):
    """What pipelines cast: not the positions."""
    kept = ("img_ids", "txt_ids")
    return {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and name not in kept else value
        for name, value in inputs.items()
    }


def test_a_bfloat16_model():
    model, inputs = flux()
    inputs = as_bfloat16(inputs)
    found = check(model.to(torch.bfloat16), inputs)
    assert found.dtype is torch.bfloat16
    enabled(model, SKIPS)
    generation(model, inputs)
    check_next_generation(model, inputs)


@pytest.mark.full("wrappings")
def test_a_model_that_is_cast_after_compiling():
    model, inputs = flux()
    enabled(model, SKIPS)
    generation(model, inputs)
    model.to(torch.bfloat16)
    assert check_next_generation(model, as_bfloat16(inputs)).dtype is torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# quantized linears

QUANTIZED = [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig]


@pytest.mark.parametrize("kind", only_in("wrappings", QUANTIZED, but=[Int8WeightOnlyConfig]))
def test_quantized_linears(kind):
    model, inputs = flux()
    full = plain(model, inputs)
    quantize_(model, kind())
    found = check(model, inputs)
    assert torch.allclose(found, full, atol=0.1) and not torch.equal(found, full)
    enabled(model, SKIPS)
    generation(model, inputs)
    check_next_generation(model, inputs)


class Quantizable(Timeless):
    def forward(self, hidden_states, encoder_hidden_states):
        return (super().forward(hidden_states, encoder_hidden_states),)


@pytest.mark.budget(60, "inductor compiles the blocks of a quantized model")
@pytest.mark.full("wrappings")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_linears_under_inductor(kind):
    """Cached output on identical inputs is the computed one, and that is what the same pieces give with no cache."""
    model = make(Quantizable, blocks=3, width=16)
    quantize_(model, kind())
    inputs = {"hidden_states": noise(width=16), "encoder_hidden_states": noise(1, 3, 16, seed=2)}
    eager = plain(model, inputs)
    enabled(model, inner_backend="inductor")
    results = [call(model, inputs) for _ in range(3)]
    assert steps(model) == [(3, [1, 2], 0)]
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])
    assert torch.allclose(results[0], eager, atol=0.05)
    disable_cache(model)
    cachedit_fx.compile(model, cache=None, inner_backend="inductor")
    assert torch.equal(call(model, inputs), results[0])


@pytest.mark.budget(60, "importing bitsandbytes, and two captures")
@pytest.mark.full("wrappings")
@torch.no_grad()
def test_linears_of_bitsandbytes():
    """They give the weight its data anew in each call. The blocks share their pieces as plain linears do."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is no dependency of the tests")

    def pieces(model, inputs):
        keys = []

        def inner(gm, _):
            keys.append(gm)
            return gm.forward

        in_place = {"hoist_invariants": False}  # layers that write their weights stay in the blocks
        cachedit_fx.compile(
            model, inner_backend=inner, Fn_compute_blocks=1, residual_diff_threshold=0.0, passes=in_place
        )
        return call(model, inputs), len(keys)

    model, inputs = models.flux(double=4, single=4)
    full = plain(model, inputs)
    wanted = pieces(copy.deepcopy(model), inputs)[1]
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "blocks" in name:
            layer = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer.to("cpu"))
    quantized = plain(model, inputs)
    result, distinct = pieces(model, inputs)
    assert torch.equal(result, quantized) and torch.allclose(quantized, full, atol=0.2)
    assert distinct == wanted == 3
    enabled(model, SKIPS)
    generation(model, inputs)
    check_next_generation(model, inputs)


# ---------------------------------------------------------------------------------------------------------------------
# grad modes


GRAD_MODES = {
    "inference mode second": (torch.no_grad, torch.inference_mode),
    "inference mode first": (torch.inference_mode, torch.no_grad),
}


@pytest.mark.parametrize("modes", only_in("wrappings", GRAD_MODES, but=["inference mode first"]))
def test_compiled_in_one_grad_mode_and_run_in_another(modes):
    model, inputs = toy()
    for mode in GRAD_MODES[modes]:
        with mode():
            check(model, inputs, lambda model, inputs: model(**inputs)[0])


@pytest.mark.parametrize("calibrator", only_in("wrappings", [None, "taylorseer"], but=["taylorseer"]))
def test_a_grad_mode_that_changes_from_step_to_step(calibrator):
    """Buffers made under inference mode are written outside it, and the reverse."""
    model, inputs = toy()

    def generated(*modes):
        hidden = inputs["hidden_states"]
        for number, time in enumerate(TIMES):
            with modes[number % len(modes)]():
                now = inputs | {"hidden_states": hidden.clone(), "timestep": torch.tensor([time])}
                hidden = hidden - 0.1 * model(**now)[0]
            hidden = hidden.clone()
        return hidden

    policy = SKIPS.reset(steps_computation_mask="11010")
    enabled(model, policy, calibrator=calibrator)
    expected = generated(torch.no_grad)
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        assert torch.equal(generated(*modes), expected)
        assert steps(model) == [(5, [2, 4], 0)]


@pytest.mark.full("wrappings")
def test_gradient_checkpointing_without_gradients():
    model, inputs = flux()
    expected = plain(model, inputs)
    model.enable_gradient_checkpointing()
    assert torch.equal(check(model, inputs), expected)
    model.train()
    assert torch.equal(check(model, inputs), expected)


def test_training_with_gradient_checkpointing_is_plain_and_says_so_once():
    model, inputs = flux()
    model.train().enable_gradient_checkpointing()
    sample = inputs["hidden_states"].requires_grad_()

    def gradients(module):
        sample.grad = None
        model.zero_grad()
        module(**inputs)[0].square().sum().backward()
        return [sample.grad, *(weight.grad.clone() for weight in model.parameters())]

    expected = gradients(model._call_impl)
    enabled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = gradients(model)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len([item for item in caught if item.category is CacheWarning]) == 1
    (region,) = summary(model)
    assert region.uncached_causes == {"gradients wanted": 3} and region.work == 1.0
    check(model, inputs | {"hidden_states": sample.detach()})  # once they are not wanted


# ---------------------------------------------------------------------------------------------------------------------
# saving, loading, copying


def test_saved_after_compiling_and_loaded_again(tmp_path):
    model, inputs = flux()
    keys, expected = list(model.state_dict()), plain(model, inputs)
    check(model, inputs)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded._compiled_call_impl is None and list(loaded.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    # Weights that lie in a mapped file may be aligned otherwise, and be multiplied by another kernel.
    assert torch.allclose(check(loaded, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("assign", only_in("wrappings", [False, True], but=[True]))
def test_weights_loaded_after_compiling(assign):
    model, inputs = toy()
    other = make(InTuple, seed=1, blocks=4)
    enabled(model, SKIPS)
    before = generation(model, inputs)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    after = check_next_generation(model, inputs)
    assert not torch.equal(after, before)
    assert torch.equal(after, generation(enabled(other, SKIPS), inputs))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


COPIES = list(itertools.product((copy.deepcopy, pickled), (contextlib.nullcontext, torch.inference_mode)))


@pytest.mark.parametrize(("duplicate", "wrap"), only_in("wrappings", COPIES, but=[COPIES[0], COPIES[3]]))
def test_a_copy_is_plain_and_the_original_goes_on(duplicate, wrap):
    """In the middle of a generation."""
    model, inputs = toy()
    expected = generation(enabled(model, SKIPS), inputs)
    uncached = generation(model._call_impl, inputs)
    hidden = inputs["hidden_states"]
    for number, time in enumerate(TIMES):
        now = inputs | {"hidden_states": hidden, "timestep": torch.tensor([time])}
        hidden = hidden - 0.1 * call(model, now)
        if number == 2:
            with wrap():
                twin = duplicate(model)
                assert twin._compiled_call_impl is None and summary(twin) == []
                assert torch.equal(generation(twin, inputs), uncached)
    assert torch.equal(hidden, expected) and steps(model) == [(5, [1, 3], 0)]
    assert torch.equal(generation(enabled(twin, SKIPS), inputs), expected)


def test_disabled_and_enabled_in_turn():
    """Results are the same each time; nothing is left behind and nothing piles up."""
    model, inputs = flux()
    uncached = generation(model, inputs)
    enabled(model, SKIPS)
    cached, seen = generation(model, inputs), []
    for _ in range(3):
        disable_cache(model)
        assert torch.equal(generation(model, inputs), uncached) and summary(model) == []
        assert model._diffusers_hook.hooks == {} and model._diffusers_hook._hook_order == []
        enabled(enabled(model, SKIPS), SKIPS)
        assert torch.equal(generation(model, inputs), cached) and steps(model) == [(5, [1, 3], 0)]
        seen.append((len(model._diffusers_hook._hook_order), len(model._forward_hooks), len(model._forward_pre_hooks)))
    assert seen == [(1, 0, 0)] * 3
    refresh_context(model, cache_config=COMPUTES)
    assert torch.equal(generation(model, inputs), uncached)
    refresh_context(model, cache_config=REUSES)
    check(model, inputs)
