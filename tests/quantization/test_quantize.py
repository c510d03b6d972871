"""`quantize` and `dequantize`: kinds, reports, refusals, and the order with the cache, copies, LoRA and sessions."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.toy_pipeline import ToyPipeline
from lib.toys import make, noise
from lib.wrapped import NEVER, SKIPS, InTuple, call, enabled, generation, plain, steps, toy
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, PerTensor

import cachedit_fx
from cachedit_fx import CacheWarning, OptionError, dequantize, quantize
from cachedit_fx.passes.graph_cost import bytes_of_tensors as bytes_of
from cachedit_fx.quantization import kinds
from cachedit_fx.quantization.apply import quantized
from cachedit_fx.quantization.kinds import ALIASES, KINDS

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*is a stand-in", "ignore:.*lru_cache")
HERE = torch.device("cpu")
RUN_HERE = [name for name, kind in KINDS.items() if kind.lack(HERE) is None]
LAYERS = 18
"""The toy's layers that are quantized: three in each of six blocks."""


def wide() -> tuple[Any, list[torch.Tensor]]:
    return make(width=32), [noise(width=32), torch.tensor([500.0]), noise(1, 3, width=32)]


def near(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((result - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("name", RUN_HERE)
def test_every_kind_that_runs_here_is_near_and_goes_back(name):
    model, inputs = wide()
    expected = model(*inputs)
    before = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    report = quantize(model, name)
    result = model(*inputs)
    assert near(result, expected, 0.05) and not torch.equal(result, expected)
    assert report.kinds == {name: LAYERS} and len(report.kept) == 9
    assert report.bytes_before == before and report.bytes_after < 0.7 * before
    assert dequantize(model) is model and {type(weight) for weight in model.parameters()} == {nn.Parameter}
    assert near(model(*inputs), result, 0.02)
    assert bytes_of([*model.parameters(), *model.buffers()]) == before and "Tensor" not in repr(model)


def test_a_weight_only_kind_rounds_the_weights_and_nothing_else():
    model, inputs = wide()
    report = quantize(model, "int8_weight_only")
    rows = sum(layer.shape[0] for layer in report.layers)
    elements = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bytes_before - report.bytes_after == 3 * elements - 5 * rows  # a float32 scale, an int8 zero point
    result = model(*inputs)
    assert torch.allclose(dequantize(model)(*inputs), result, atol=1e-5)


def test_a_configuration_of_torchao_is_a_kind():
    model, _ = wide()
    report = quantize(model, Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False))
    assert report.kinds == {"Int8WeightOnlyConfig": LAYERS}
    assert model.blocks[0].up.weight.scale.numel() == 1


def test_a_quantized_block_of_code_leaves_no_trace():
    model, inputs = wide()
    before, expected, shown = [*model.parameters()], model(*inputs), repr(model)
    with quantized(model, {"up": "int8", "blocks.0.down": "int8_weight_only"}) as report:
        assert report.kinds == {"int8": 6, "int8_weight_only": 1}
        assert not torch.equal(model(*inputs), expected)
    with pytest.raises(KeyboardInterrupt), quantized(model, {"up": "int8"}):
        raise KeyboardInterrupt
    assert all(now is weight for now, weight in zip(model.parameters(), before, strict=True)) and repr(model) == shown
    assert torch.equal(model(*inputs), expected)


def test_inductors_options_stay_as_they_are():
    before = torch._inductor.config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    for name in RUN_HERE:
        quantize(wide()[0], name)
    assert (torch._inductor.config.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


def test_the_random_numbers_of_the_caller_stay_as_they_are():
    model, _ = wide()
    state = torch.random.get_rng_state()
    quantize(model, "int8")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_report_shows_layers_bytes_and_reasons():
    report = quantize(wide()[0], "int8", exclude="blocks.1", per_layer={"up": "float8_weight_only"})
    shown = str(report)
    assert "Toy: 15 of 27 linear layers quantized; all weights 162 KiB before" in shown
    for row in (
        r"blocks\.\*\.up +float8_weight_only +5 +64 x 32 +40 KiB +11\.2 KiB",
        r"blocks\.\*\.down +int8 +5 +32 x 64",
        r"blocks\.\*\.up +excluded by 'blocks\.1' +1",
        r"out +outside the repeated blocks",
        r"Note: int8 gains no time on a CPU in layers of fewer than 64 input features in float32, which are 5\s+of 10",
    ):
        assert re.search(row, shown), shown
    assert report.reasons["outside the repeated blocks"] == 3
    assert sum(layer.bytes_after for layer in report.layers) < sum(layer.bytes_before for layer in report.layers) / 3
    assert max(map(len, shown.splitlines())) <= 100


def test_the_page_lists_every_kind():
    page = (Path(__file__).resolve().parents[2] / "docs/quantization.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE))
    assert rows == {name: kind.meaning for name, kind in KINDS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# refusals, before a weight changes


class Gpu:
    """In the place of torch.cuda."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def is_available(self) -> bool:
        return True

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, device: torch.device) -> str:
        return "NVIDIA A100"


NEED_A_GPU = [name for name in KINDS if name not in RUN_HERE]


@pytest.mark.parametrize("name", NEED_A_GPU)
def test_a_kind_that_lacks_hardware_is_refused_with_what_runs_here(name):
    model, _ = wide()
    with pytest.raises(OptionError) as error:
        quantize(model, name)
    words = f"quant_type='{name}' does not run here: it needs an NVIDIA GPU of compute capability"
    assert str(error.value).startswith(words)
    assert "on 'cpu' run float8_weight_only, int8, int8_per_tensor, int8_weight_only" in str(error.value)
    assert "as stand-ins of int8's size int4_emulated, int4_weight_only_emulated" in str(error.value)
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    """With a stand-in for the GPU, since none is here."""
    monkeypatch.setattr(kinds.torch, "cuda", Gpu((8, 0)))
    gpu = torch.device("cuda")
    lacks = {name: kind.lack(gpu) for name, kind in KINDS.items()}
    assert lacks["float8"] == ("it needs an NVIDIA GPU of compute capability 8.9 or newer; NVIDIA A100 has 8.0")
    assert lacks["int8"] is lacks["int4_weight_only"] is None
    assert "move the module to the GPU first" in str(KINDS["float8"].lack(HERE))
    monkeypatch.setattr(kinds.torch, "cuda", Gpu((10, 0)))
    monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    assert KINDS["int4"].lack(gpu) == "it needs the package mslk, which is not installed"
    assert {name for name, kind in KINDS.items() if kind.lack(gpu)} == {"int4"}


def test_what_torchao_refuses_in_the_trial_is_refused_before_a_weight_changes(monkeypatch):
    model, inputs = wide()
    expected = model(*inputs)
    monkeypatch.setattr("torchao.quantization.quantize_", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no sm")))
    with pytest.raises(OptionError, match="quant_type='int8': torchao does not take it here: no sm; on 'cpu' run"):
        quantize(model, "int8")
    monkeypatch.setattr("torchao.quantization.quantize_", lambda *_, **__: None)
    with pytest.raises(OptionError, match="torchao leaves a layer of this shape as it is"):
        quantize(model, "int8")
    assert torch.equal(model(*inputs), expected)


def test_a_shape_that_fails_in_the_trial_is_kept_alone(monkeypatch):
    from torchao import quantization

    def picky(shell, config, filter_fn, original=quantization.quantize_):
        if isinstance(shell, nn.Sequential) and shell[0].out_features == 64:
            raise AssertionError
        original(shell, config, filter_fn)

    monkeypatch.setattr(quantization, "quantize_", picky)
    report = quantize(wide()[0], "int8_weight_only")
    assert report.reasons["torchao does not take it here: AssertionError"] == 6 and len(report.layers) == 12


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown kind": ("int3", {}, "quant_type='int3' is not allowed: .*did you mean 'int8'"),
    "no kind": (None, {}, "per_layer is empty"),
    "a number": (8, {}, "quant_type=8 is not allowed: it must be a configuration of torchao or one of float8"),
    "kind in a plan": ("int8", {"per_layer": {"up": "int9"}}, "per_layer='int9' is not allowed"),
    "a plan that is none": ("int8", {"per_layer": ["up"]}, "per_layer=.* must be a dict"),
    "exclude": ("int8", {"exclude": 3}, "exclude=3 is not allowed: it must be a name or a list of names"),
    "regional": ("int8", {"regional": 1}, "regional=1 is not allowed"),
    "nothing left": ("int8", {"exclude": "blocks"}, "nothing to quantize: 3 x outside .*; 24 x excluded by 'blocks'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_words(case):
    model, _ = wide()
    quant_type, settings, words = BAD[case]
    with pytest.raises(OptionError, match=words):
        quantize(model, quant_type, **settings)
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}


def test_a_model_without_linear_layers_has_nothing_to_quantize():
    with pytest.raises(OptionError, match="Conv2d: nothing to quantize: it has no linear layer"):
        quantize(nn.Conv2d(1, 1, 1), "int8")


def test_what_is_quantized_already_is_an_error_unless_there_is_more():
    model, _ = wide()
    quantize(model, "int8")
    with pytest.raises(OptionError, match="18 layers are quantized already, .* call dequantize first"):
        quantize(model, "float8_weight_only")
    report = quantize(model, "float8_weight_only", include="out")
    assert [layer.name for layer in report.layers] == ["out"]
    assert report.reasons["quantized already (Int8Tensor)"] == LAYERS


def test_names_of_kinds_may_be_in_capitals_or_long():
    assert quantize(wide()[0], "INT8_per_row").kinds == {"int8": LAYERS}
    assert all(name in KINDS for name in ALIASES.values())


def test_weights_that_wait_on_the_host_are_an_error():
    model, _ = toy()
    enabled(model, time_weights="host")
    with pytest.raises(OptionError, match="wait on the host .*before enable_cache"):
        quantize(model, "int8")


# ---------------------------------------------------------------------------------------------------------------------
# warnings


def said(model, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes = quantize(model, name).notes
    assert [f"Toy: {note}" for note in notes] == [str(each.message) for each in caught if each.category is CacheWarning]
    return " ".join(notes)


def test_a_kind_that_gains_nothing_says_so():
    assert "fewer than 64 input features in float32, which are 12 of 18" in said(wide()[0], "int8")
    assert said(make(blocks=2, width=64), "int8") == ""
    assert "fewer than 256 input features in bfloat16, which are" in said(make(blocks=2, width=64).bfloat16(), "int8")
    assert "2.2 to 2.7 times" in said(wide()[0].bfloat16(), "int8_weight_only")
    assert said(wide()[0], "int8_weight_only") == ""
    assert "stand-in: it rounds like int4," in said(wide()[0], "int4_emulated")


# ---------------------------------------------------------------------------------------------------------------------
# pipelines


def test_components_of_a_pipeline():
    pipe: Any = ToyPipeline(make())
    pipe.components |= {"transformer_2": make(), "text_encoder": make(), "vae": nn.Linear(8, 8)}
    pipe.components["transformer_3"] = pipe.transformer  # one module under two names
    report = quantize(pipe, "int8")
    assert {layer.name.partition(".")[0] for layer in report.layers} == {"transformer", "transformer_2"}
    assert len(report.layers) == 2 * LAYERS and report.title == "Toy, Toy"
    report = quantize(pipe, "int8_weight_only", components="text_encoder", exclude="blocks.0")
    assert report.layers[0].name == "text_encoder.blocks.1.up"
    with pytest.raises(TypeError, match="has no such module; it has transformer, transformer_2, text_encoder, vae, "):
        quantize(pipe, "int8", components=("text_encoder", "unet"))
    with pytest.raises(TypeError, match="expected a torch.nn.Module or a diffusers pipeline, not int"):
        quantize(3, "int8")
    assert dequantize(pipe) is pipe
    types = {name: type(part.blocks[1].up.weight) for name, part in pipe.components.items() if hasattr(part, "blocks")}
    assert types.pop("text_encoder") is not nn.Parameter and {*types.values()} == {nn.Parameter}


# ---------------------------------------------------------------------------------------------------------------------
# with the cache


def test_quantized_before_or_after_enabling_is_one_and_threshold_zero_is_exact():
    """In the middle of a generation, too: the next call begins one."""
    model, inputs = toy()
    enabled(model, SKIPS)
    unquantized = generation(model, inputs)
    call(model, inputs | {"timestep": torch.tensor([0.9])})
    quantize(model, "int8")
    after = generation(model, inputs)
    assert steps(model) == [(5, [1, 3], 0)] and not torch.equal(after, unquantized)

    other, _ = toy()
    quantize(other, "int8")
    expected = plain(other, inputs)
    enabled(other, NEVER)
    assert torch.equal(call(other, inputs), expected)
    enabled(other, SKIPS)
    assert torch.equal(generation(other, inputs), after)

    with cachedit_fx.session("one"):
        assert torch.equal(generation(other, inputs), after)
    twin = copy.deepcopy(other)
    assert twin._compiled_call_impl is None and torch.equal(call(twin, inputs), expected)
    dequantize(twin)
    assert torch.equal(call(cachedit_fx.disable_cache(other), inputs), expected)


def test_the_blocks_share_their_pieces_by_kind():
    def pieces(**settings):
        model, inputs = toy()
        if settings:
            quantize(model, **settings)
        graphs = []

        def inner(gm, _):
            graphs.append(gm)
            return gm.forward

        cachedit_fx.compile(model, inner_backend=inner, Fn_compute_blocks=1, residual_diff_threshold=0.0)
        call(model, inputs)
        return len(graphs)

    unquantized = pieces()
    assert pieces(quant_type="int8") == unquantized
    assert pieces(quant_type="int8", per_layer={"blocks.2": "int8_weight_only"}) == unquantized + 1
    mixed = ("int8", None, "int8", "int8_weight_only")
    plan = {f"blocks.{number}.down": kind for number, kind in enumerate(mixed)}
    assert pieces(quant_type=None, per_layer=plan) == unquantized + 2


def test_lora_is_never_quantized_and_may_come_before_or_after():

    def add_adapter(model):
        torch.manual_seed(3)
        targets = ["up", "down"]
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), model)

    before: Any = make(InTuple, blocks=2)
    add_adapter(before)
    report = quantize(before, "int8", include="lora_A")
    assert report.reasons["a layer of an adapter (LoRA)"] == 8 and len(report.layers) == 6
    assert {layer.name for layer in report.layers} >= {"blocks.0.up.base_layer", "blocks.1.text"}
    assert type(before.blocks[0].up.lora_A["default"].weight) is nn.Parameter

    after = make(InTuple, blocks=2)
    quantize(after, "int8")
    add_adapter(after)
    inputs = toy()[1]
    assert torch.equal(call(before, inputs), call(after, inputs))
