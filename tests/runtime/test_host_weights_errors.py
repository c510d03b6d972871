"""Errors and words of `time_weights="host"`, and the models that it leaves alone."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from lib.conditioned import Conditioned, conditions, sample, times
from lib.host_weights import HOSTED, behind_time, generation, layers_on_host, make, small
from torch import nn

from cachedit_fx import CacheWarning, OptionError, enable_cache
from cachedit_fx.runtime.host_tensor import HostWeightError

pytestmark = [pytest.mark.keep_compiled, pytest.mark.usefixtures("emulated")]


def test_a_call_of_the_plain_module_raises_and_names_the_layer(hosted):
    with pytest.raises(HostWeightError, match=r"time\.(weight|bias) lies on the host .*disable_cache"), torch.no_grad():
        hosted.forward(sample(), times()[0], **conditions())


def test_a_call_with_gradients_raises_and_names_the_layer(hosted):
    hidden = sample().requires_grad_()
    with pytest.raises(HostWeightError, match=r"^time\.weight lies on the host.*, as 7 more weights do.*gradients"):
        hosted(hidden, times()[0], **conditions())
    generation(hosted)


class Other(nn.Module):
    """In another form of the call the sample passes through the projection of the timestep."""

    def __init__(self):
        super().__init__()
        self.model = small()

    def forward(self, hidden_states, timestep, shifts=False, **inputs):
        if shifts:
            hidden_states = self.model.time(hidden_states)
        return self.model(hidden_states, timestep, **inputs)


def test_another_graph_that_needs_a_weight_raises_and_names_it():
    model = make(Other)
    generation(model)
    with pytest.raises(HostWeightError, match=r"^model\.time\.weight lies on the host.*another graph"):
        with torch.no_grad():
            model(sample(), times()[0], shifts=True, **conditions())
    generation(model)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = small()

    def forward(self, hidden_states, timestep, **inputs):
        hidden_states = hidden_states + 1
        torch._dynamo.graph_break()
        return self.model(hidden_states, timestep, **inputs)


def test_code_between_graphs_keeps_all_weights_on_the_device():
    model = make(Broken)
    with pytest.warns(
        CacheWarning, match="all weights of Broken stay on cpu, since a call is not captured as one graph"
    ):
        generation(model)
    assert not layers_on_host(model)


@pytest.mark.full("wrappings")
def test_with_model_offload():
    torch.manual_seed(0)
    model, cpu = small(), torch.device("cpu")
    plain = copy.deepcopy(model)
    cpu_offload(nn.Linear(1, 1), execution_device=cpu)(torch.zeros(1, 1))  # accelerate makes its hooks' functions
    _, hook = cpu_offload_with_hook(model, execution_device=cpu)
    enable_cache(model, **HOSTED)
    for seed in range(2):
        prompt = conditions(seed)
        with torch.no_grad():
            for step, time in enumerate(times()):
                assert torch.equal(model(sample(step), time, **prompt), plain(sample(step), time, **prompt))
        hook.offload()
        assert layers_on_host(model) == behind_time(model)


@pytest.mark.full("wrappings")
def test_weights_of_a_model_offloaded_by_groups_are_left_to_its_hooks():
    """Blocks are then graphs of their own, and nothing is hoisted."""
    torch.manual_seed(0)
    model, cpu = small(), torch.device("cpu")
    own, plain = dict(model.named_parameters()), copy.deepcopy(model)
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", use_stream=False)
    enable_cache(model, **HOSTED)
    with pytest.warns(CacheWarning, match="all weights of Conditioned stay on cpu"), torch.no_grad():
        result = model(sample(), times()[0], **conditions())
    assert torch.equal(result, plain(sample(), times()[0], **conditions()))
    assert dict(model.named_parameters()) == own


def test_a_first_call_that_fails_decides_nothing():
    model = make()
    with pytest.warns(CacheWarning, match="stay on cpu"), pytest.raises(RuntimeError), torch.no_grad():
        model(sample()[..., :3], times()[0], **conditions())
    generation(model)
    assert layers_on_host(model) == behind_time(model)


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.undo()
    model = small()
    own = dict(model.named_parameters())
    enable_cache(model, **HOSTED)
    with pytest.warns(CacheWarning, match="time_weights='host' changes nothing: Conditioned runs on the device 'cpu'"):
        generation(model)
    assert dict(model.named_parameters()) == own


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"time_weights": "cpu"}, "one of 'device', 'host'"),
        ({"time_weights": "hots"}, "one of 'device', 'host'"),
        ({"time_weights": "host", "cache": None}, "cache=None leaves nothing hoisted"),
        ({"time_weights": "host", "passes": {"hoist_invariants": False}}, "passes={'hoist_invariants': False} leaves"),
        ({"time_weights": "host", "passes": {"infer_dependence": False}}, "passes={'infer_dependence': False} leaves"),
        ({"time_weights": "host", "verify": "first"}, "verify compares with the plain module"),
    ],
)
def test_options_that_cannot_be(options, error):
    model = small()
    with pytest.raises(OptionError) as caught:
        enable_cache(model, **options)
    assert error in str(caught.value)
    assert not layers_on_host(model)


def test_a_backend_of_torch_refuses():
    model = torch.compile(Conditioned(), backend="cachedit", options={"time_weights": "host", "inner_backend": "eager"})
    with pytest.raises(Exception, match="torch.compile hands a backend graphs: use enable_cache"), torch.no_grad():
        model(sample(), times()[0], **conditions())
