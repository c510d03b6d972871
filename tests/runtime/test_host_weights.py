"""Weights behind the timestep alone that lie on the host: `time_weights="host"`.

No accelerator is at hand. Two emulations stand for one. The CPU is taken for a device that is not the host, so values
are real and must be equal to the bit. The device "meta" is another device, so nothing may lie in a wrong place.
"""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from lib.conditioned import Conditioned, StorageWatch, conditions, sample, times
from lib.helpers import on_a_device
from lib.hoisting import ALWAYS
from lib.host_weights import EXACT, HOSTED, behind_time, generation, layers_on_host, make, small, timed
from lib.toy_pipeline import ToyPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import fx, nn
from torch.testing._internal.two_tensor import TwoTensor

import cachedit_fx
from cachedit_fx import disable_cache, enable_cache, explain, placement
from cachedit_fx.passes.outline_blocks import KIND
from cachedit_fx.runtime import hoisting, host_tensor
from cachedit_fx.runtime.host_pieces import HostPiece
from cachedit_fx.runtime.host_tensor import HostWeight, HostWeightError

pytestmark = [
    pytest.mark.keep_compiled,
    pytest.mark.usefixtures("emulated"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]


class Adapted(PeftAdapterMixin, Conditioned):
    """Takes adapters as diffusers' models do."""


# ---------------------------------------------------------------------------------------------------------------------
# What lies where


def test_weights_behind_the_timestep_alone_lie_on_the_host(hosted):
    assert layers_on_host(hosted) == behind_time(hosted)
    generation(hosted, 1)


def test_before_the_first_call_all_weights_wait_on_the_host():
    model = make()
    own = dict(model.named_parameters())
    assert all(isinstance(weight, HostWeight) for weight in own.values())
    disable_cache(model)
    assert all(own[name].host is weight for name, weight in model.named_parameters())


class OnDevice(nn.Module):
    """Takes the timestep to the device itself."""

    def __init__(self):
        super().__init__()
        self.model = timed()

    def forward(self, hidden_states, timestep, **inputs):
        return self.model(hidden_states, timestep.to(hidden_states.device), **inputs)


def test_on_a_device_of_another_kind(monkeypatch):
    """Values have no numbers there. They are computed on the host, from numbers, and only results leave it."""
    monkeypatch.setattr(placement, "is_accelerator", lambda device: device.type == "meta")
    model = make(OnDevice, **ALWAYS).to("meta")
    weights = list(model.parameters())
    assert {weight.device.type for weight in weights} == {"meta"}
    assert {weight.host.device.type for weight in weights} == {"cpu"}  # nothing has travelled
    sources: list[str] = []
    results: list[list[str]] = []
    call = HostPiece.__call__

    def noting(piece, *arguments):
        values = call(piece, *arguments)
        sources.extend(each.device.type for each in arguments if isinstance(each, torch.Tensor))
        results.append([each.device.type for each in values])
        return values

    monkeypatch.setattr(HostPiece, "__call__", noting)
    prompt = {name: value.to("meta") for name, value in conditions().items()}
    with torch.no_grad():
        for step, time in enumerate(times(2)):
            assert model(sample(step).to("meta"), time, **prompt).device.type == "meta"
    assert layers_on_host(model) == behind_time(model)
    assert set(sources) == {"cpu"}
    assert results == [["cpu"], *[["meta"]] * 3] * 2  # what the modulations are made of stays
    explanation = explain(model)
    on_host = sum(weight.nbytes for weight in model.parameters() if isinstance(weight, HostWeight))
    assert explanation.host_bytes == on_host > 0
    assert f'time_weights="host" takes off the device: {on_host / 2**20:.3g} MiB' in str(explanation)


def test_a_named_device_becomes_the_host():
    graph = fx.Graph()
    time = graph.placeholder("time")
    time.meta["example_value"] = torch.empty(2, device="meta")
    steps = graph.call_function(torch.arange, (2,), {"device": torch.device("meta")})
    total = graph.call_function(torch.add, (graph.call_method("to", (time, "meta")), steps))
    total.meta = {"example_value": torch.empty(2, device="meta"), KIND: "prologue"}
    graph.output((total,))
    (result,) = HostPiece(fx.GraphModule({}, graph), [False])(torch.ones(2))
    assert result.tolist() == [1, 2]


class Tied(nn.Module):
    """One modulation is read by what depends on the sample too; one shares its memory with a buffer."""

    def __init__(self):
        super().__init__()
        self.model, self.also = Conditioned(blocks=3), nn.Linear(16, 48, bias=False)
        one, two = (self.model.get_parameter(f"blocks.{number}.modulation.weight") for number in (1, 2))
        self.also.weight = one
        self.register_buffer("view", two.detach()[:2])

    def forward(self, hidden_states, timestep, **inputs):
        return self.model(hidden_states + self.also(hidden_states)[..., :16], timestep, **inputs)


def test_shared_weights_stay_on_the_device():
    model = make(Tied)
    generation(model)
    stay = {"model.blocks.1.modulation.weight", "also.weight", "model.blocks.2.modulation.weight"}
    assert set(layers_on_host(model)) == set(behind_time(model)) - stay


def test_tensors_of_other_kinds_stay_whole_on_the_device():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    placement.keep_on_host(layer, list(layer.parameters()))
    assert layers_on_host(layer) == ["bias"]


def test_layers_that_share_a_parameter_share_it_on_the_host():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = weight = one.weight
    layers = nn.ModuleList([one, two])
    placement.keep_on_host(layers, [weight])
    first, second = (layer._parameters["weight"] for layer in layers)
    assert first is second is not weight
    placement.bring_back(layers)
    first, second = (layer._parameters["weight"] for layer in layers)
    assert first is second is weight


# ---------------------------------------------------------------------------------------------------------------------
# What is computed, and from which weights


def test_a_warm_step_reads_no_weight_on_the_host():
    model = make(timed)
    generation(model)
    prompt = conditions()
    weights = [weight.host for weight in model.parameters() if isinstance(weight, HostWeight)]
    with torch.no_grad():
        model(sample(), times()[0], **prompt)  # reads samples of the weights
        with StorageWatch() as watch:
            for step, time in enumerate(times()[1:]):
                model(sample(step), time, **prompt)
    assert not any(watch.has_read(weights))


@pytest.mark.parametrize("through", ["host", "data", "layer", "load"])
def test_weights_on_the_host_that_change(hosted, through):
    before = generation(hosted)[0]
    layer = hosted.blocks[1].modulation
    with torch.no_grad():
        if through == "host":
            layer.weight.host.data.mul_(1.5)
        elif through == "data":
            layer.weight.data = layer.weight.data * 1.5
        elif through == "layer":
            layer.weight.mul_(1.5)
        else:
            hosted.load_state_dict({name: value * 1.5 for name, value in hosted.state_dict().items()})
    assert layers_on_host(hosted) == behind_time(hosted)
    assert not torch.equal(generation(hosted)[0], before)


@pytest.mark.parametrize("guards", ["always", "generation"])
def test_a_clock_is_read_once_where_a_device_has_the_timestep(guards, monkeypatch):
    on_a_device(monkeypatch)
    model = make(timed, guards=guards, **ALWAYS)
    pipe = Hosted(model)
    counts = [pipe.pieces_computed(monkeypatch) for _ in range(2)]
    assert counts == [8 * 4, 0]


def test_without_a_clock_the_timestep_is_read_at_each_step(monkeypatch):
    """A tensor is on the emulated device until a copy of it is made."""
    monkeypatch.setattr(hoisting, "on_host", lambda tensor: not hasattr(tensor, "is_on_device"))
    monkeypatch.setattr(hoisting, "to_host", torch.Tensor.clone)
    model = make(timed)
    prompt, plain = conditions(), copy.deepcopy(model)
    calls = count_pieces(monkeypatch)
    for expected in (4 * 4, 0):
        calls.clear()
        for step, time in enumerate(times()):
            setattr(time, "is_on_device", True)  # noqa: B010 - no attribute of a tensor's class
            with torch.no_grad():
                result = model(sample(step), time, **prompt)
                assert torch.equal(result, plain(sample(step), times()[step], **prompt))
        assert len(calls) == expected


def count_pieces(monkeypatch):
    """A list that grows with each hoisted piece that runs on the host."""
    calls, call = [], HostPiece.__call__

    def noting(piece, *arguments):
        calls.append(piece)
        return call(piece, *arguments)

    monkeypatch.setattr(HostPiece, "__call__", noting)
    return calls


class Hosted(ToyPipeline):
    """Denoises, and compares each step with an uncompiled copy, up to rounding in a batch."""

    def __init__(self, model):
        super().__init__(model)
        self.plain, self.prompt = copy.deepcopy(model), conditions()

    def predict(self, latents, timestep, step):
        time = timestep.expand(1)
        result = self.transformer(latents, time, **self.prompt)
        torch.testing.assert_close(result, self.plain(latents, time, **self.prompt), rtol=1e-4, atol=1e-5)
        return result

    def pieces_computed(self, monkeypatch):
        with monkeypatch.context() as patch, torch.no_grad():
            calls = count_pieces(patch)
            self(sample())
        return len(calls)


def test_all_steps_at_once(monkeypatch):
    pipe = Hosted(make(motion="batched", **ALWAYS))
    assert pipe.pieces_computed(monkeypatch) == 8 * 5  # shows the timesteps
    for seed in (1, 2):
        pipe.prompt = conditions(seed)
        assert pipe.pieces_computed(monkeypatch) == 4  # the projection of the timestep is kept


def test_sessions_and_threads(hosted):
    errors = []

    def denoise(seed):
        try:
            with cachedit_fx.session(seed):
                for _ in range(3):
                    generation(hosted, seed)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=denoise, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---------------------------------------------------------------------------------------------------------------------
# The module goes on working


def test_writes_and_reads_outside_of_calls(monkeypatch):
    """Tensors on a device are copied to the host, and never written to in place of what they were copied from."""
    monkeypatch.setattr(host_tensor, "to_host", torch.Tensor.clone)
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    weight, ones = HostWeight.of(parameter, "layer.weight"), torch.ones(2, 3)
    with torch.no_grad():
        weight.add_(ones)
        weight.data *= 2
        weight[0].copy_(ones[0])
    assert parameter.tolist() == [[1, 1, 1], [8, 10, 12]]
    copied = torch.zeros(2, 3)
    copied.copy_(weight.detach())
    assert torch.equal(copied, parameter)
    assert bool(weight.detach().isfinite().all())
    assert weight.share_memory_() is weight
    assert parameter.is_shared()
    with pytest.raises(HostWeightError, match=r"^layer\.weight lies on the host.*aten\.add\.Tensor takes it"):
        ones + weight


def test_the_state_dict_is_plain(hosted):
    state = hosted.state_dict()
    plain = copy.deepcopy(hosted).state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert all(torch.equal(value, plain[name]) for name, value in state.items())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert all(torch.equal(value, plain[name]) for name, value in torch.load(file).items())


def test_disable_cache_brings_the_own_parameters_back():
    model = small()
    own, expected = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    enable_cache(model, **HOSTED)
    generation(model)
    disable_cache(model)
    assert dict(model.named_parameters()) == own
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(layer._state_dict_hooks for layer in model.modules())
    generation(model)


@pytest.mark.parametrize("ends", [lambda model: None, disable_cache], ids=["enabled", "disabled"])
def test_weights_on_the_host_die_with_their_module(ends):
    model = make()
    generation(model, steps=1)
    own = [weakref.ref(weight.host) for weight in model.parameters() if isinstance(weight, HostWeight)]
    ends(model)
    del model
    gc.collect()
    assert own
    assert not any(each() is not None for each in own)


def test_enabled_anew_without_the_option_all_weights_are_back():
    model = make()
    generation(model)
    enable_cache(model, **EXACT)
    assert not layers_on_host(model)
    generation(model)


def test_moved_after_the_first_call_the_weights_stay_on_the_host(hosted):
    on_host = layers_on_host(hosted)
    hosted.to("cpu").to(torch.float64).to(torch.float32)
    assert layers_on_host(hosted) == on_host
    generation(hosted)
    for name in on_host:  # what `to` does with each parameter, for a device that is not here
        weight = hosted.get_parameter(name)
        weight.data = torch.ops.aten._to_copy(weight.data, device="cuda:0")
        assert (weight.device.type, weight.host.device.type) == ("cuda", "cpu")
        weight.data = torch.ops.aten._to_copy(weight.data, device="cpu")
    generation(hosted)


def test_adapters_on_layers_that_lie_on_the_host():
    model = make(lambda: Adapted(blocks=2))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["modulation", "ff", "time"], init_lora_weights=False)
    twin = copy.deepcopy(model)
    twin.add_adapter(config)
    adapter = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(twin).items()}
    changes = {
        "load": lambda: model.load_lora_adapter(dict(adapter), adapter_name="one"),
        "scale": lambda: model.set_adapters("one", 0.5),
        "fuse": lambda: model.fuse_lora(safe_fusing=True),
        "unfuse": model.unfuse_lora,
        "delete": lambda: model.delete_adapters("one"),
    }
    first = [generation(model)[0]]
    for change in changes.values():
        change()
        first.append(generation(model)[0])
        assert len(layers_on_host(model)) == 8
    plain, loaded, scaled, fused, unfused, deleted = first
    assert not torch.allclose(plain, loaded) and not torch.allclose(loaded, scaled)
    torch.testing.assert_close(fused, scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unfused, scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deleted, plain, rtol=1e-4, atol=1e-5)
