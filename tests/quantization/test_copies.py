"""Quantized copies follow their weights: written, loaded, replaced, cast, quantized, shared and freed ones."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from lib.low_precision import NEVER, TEXT, TIMES, are_equal, enabled, quantized, steps, wide
from lib.toys import Toy, make, noise
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import cachedit_fx
from cachedit_fx import CacheWarning, PrecisionConfig, dequantize, explain, quantize, summary
from cachedit_fx.runtime.registry import states_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*lru_cache")


def _in_place(model: Any) -> None:
    model.blocks[1].up.weight.mul_(1.5)


def _through_data(model: Any) -> None:
    model.blocks[1].up.weight.data.mul_(1.5)


def _new_parameter(model: Any) -> None:
    model.blocks[1].up.weight = nn.Parameter(model.blocks[1].up.weight * 1.5, requires_grad=False)


def _loaded(model: Any) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def _assigned(model: Any) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)


def _same_layer(model: Any) -> None:
    model.blocks[1].up = make(nn.Linear, in_features=32, out_features=64).requires_grad_(False)


def _layer_that_wants_gradients(model: Any) -> None:
    model.blocks[1].up = make(nn.Linear, in_features=32, out_features=64)  # dynamo captures anew


def _adapter(model: Any) -> None:
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(target_modules=["up"], r=2, init_lora_weights=False), model)
    model.eval().requires_grad_(False)


CHANGES = [
    _in_place,
    _through_data,
    _new_parameter,
    _loaded,
    _assigned,
    _same_layer,
    _layer_that_wants_gradients,
    _adapter,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_gets_a_new_copy(change):
    model = wide()
    enabled(model)
    steps(model)
    change(model)
    cachedit_fx.refresh_context(model)
    plain = copy.deepcopy(model)
    results, full, low = steps(model), steps(plain), steps(quantized(plain))
    assert are_equal(results, full) == [True, False, True, False]
    assert are_equal(results, low) == [False, True, False, True]


@torch.no_grad()
def test_a_weight_that_is_written_to_within_a_generation_gets_a_new_copy():
    model = enabled(wide())
    for time in TIMES[:2]:
        model(noise(width=32), torch.tensor([time]), TEXT)
    _in_place(model)
    twin = quantized(copy.deepcopy(model))
    results = [model(noise(width=32), torch.tensor([time]), TEXT) for time in TIMES[2:]]
    assert torch.equal(results[1], steps(twin)[3]) and summary(model)[0].low_steps == [1, 3]


def test_a_weight_that_is_written_through_data_before_the_first_check_gets_a_new_copy():
    model = enabled(wide())
    with torch.no_grad():
        model(noise(width=32), torch.tensor([900.0]), TEXT)  # a full step: copies were made for the capture alone
    _through_data(model)
    cachedit_fx.refresh_context(model)
    assert are_equal(steps(model), steps(quantized(copy.deepcopy(model)))) == [False, True, False, True]


def test_a_cast_model_gets_new_copies():
    model = enabled(wide())
    steps(model)
    model.to(torch.bfloat16)
    twin = quantized(copy.deepcopy(model))
    inputs = [noise(width=32).bfloat16(), torch.tensor([TIMES[1]]), TEXT.bfloat16()]
    enabled(model, PrecisionConfig("int8"))
    with torch.no_grad():
        assert torch.equal(model(*inputs), twin(*inputs))


def test_a_weight_that_is_quantized_later_gets_no_copy():
    model = wide()
    enabled(model)
    steps(model)
    for change in (lambda: quantize(model, "int8_weight_only", exclude=["up", "text"]), lambda: dequantize(model)):
        change()
        plain = copy.deepcopy(model)
        results = steps(model)
        assert are_equal(results, steps(plain)) == [True, False, True, False]
        assert are_equal(results, steps(quantized(plain))) == [False, True, False, True]
    quantize(model, "int8")
    assert are_equal(steps(model), steps(copy.deepcopy(model))) == [True] * 4 and summary(model)[0].low_steps == []


class Odd(nn.Linear):
    """Has no quantized form."""

    def forward(self, hidden):
        return hidden @ self.weight.T + self.bias


def test_layers_that_another_class_replaces_run_in_full_precision_with_a_warning():
    model = enabled(wide(), PrecisionConfig(None, per_layer={"blocks.1.up": "int8"}))
    steps(model)
    assert summary(model)[0].low_steps == [0, 1, 2, 3]
    model.blocks[1].up = make(Odd, in_features=32, out_features=64)
    cachedit_fx.refresh_context(model)
    with pytest.warns(CacheWarning, match="since layers were replaced: quant_type='int8': its class Odd"):
        results = steps(model)
    assert are_equal(results, steps(copy.deepcopy(model))) == [True] * 4


@pytest.mark.parametrize("choice", [{"exclude": ["blocks.1.up"]}, {"per_layer": {"blocks.1.up": "int8_weight_only"}}])
def test_a_weight_whose_layers_want_different_things_is_taken_as_it_is(choice):
    model = wide()
    model.blocks[2].up.weight = model.blocks[1].up.weight
    twin = quantized(model, exclude=["blocks.0", "blocks.1.up", "blocks.2.up"])
    enabled(model, PrecisionConfig("int8", **choice))
    assert are_equal(steps(model), steps(twin)) == [True] * 4


def test_copies_of_the_first_and_last_blocks_are_not_kept():
    model = enabled(wide(), cache=NEVER.reset(Bn_compute_blocks=1))
    steps(model)
    (state,) = states_of(model)
    count, size, _ = explain(model).copies
    assert state.copies is not None and state.copies.bytes_held == size and count == 3
    explain(model, noise(width=32), torch.tensor([500.0]), TEXT)
    assert state.copies.bytes_held == size


def test_copies_die_with_the_model():
    model = enabled(wide())
    steps(model)
    (state,) = states_of(model)
    assert state.copies is not None
    held: list[Any] = [weakref.ref(state.copies), weakref.ref(state.copies.of([model.blocks[1].up.weight])[0])]
    del model, state
    for _ in range(2):  # the first makes the model's call let go of its state
        gc.collect()
    assert [reference() for reference in held] == [None, None]


class Tied(Toy):
    """Reads a linear layer's weight in another way too."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        hidden: Any = super().forward(hidden_states, timestep, encoder_hidden_states)
        layer: Any = self.get_submodule("blocks.1.up")
        return hidden + layer.weight.sum()


def test_a_weight_that_other_code_reads_is_taken_as_it_is():
    model = wide(Tied)
    twin = copy.deepcopy(model)
    quantize(twin, "int8", exclude=["blocks.0", "blocks.1.up"])
    enabled(model, PrecisionConfig("int8"))
    assert are_equal(steps(model), steps(twin)) == [True] * 4
