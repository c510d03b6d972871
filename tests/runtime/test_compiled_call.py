"""The call of a compiled module: dynamo's flags for itself alone, several graphs that are one call, another capture."""

import contextlib
import inspect
import random
import warnings
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lib import models
from lib.cases import Chain, Halves
from lib.toys import Toy, make, noise
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from cachedit_fx import CacheWarning, DBCacheConfig, OptionError, compile, explain, summary
from cachedit_fx.config.options import Options
from cachedit_fx.runtime import compiled_call
from cachedit_fx.runtime.compiled_call import capturing, first_break

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
ALWAYS = DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=1e9)
FLAGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")


def flags():
    return [getattr(torch._dynamo.config, name) for name in FLAGS]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_first_call_on_a_cpu_warms_up(monkeypatch, on_cpu):
    begun: list[Options] = []
    monkeypatch.setattr(compiled_call, "warm_up", begun.append)
    monkeypatch.setattr(compiled_call, "on_host", lambda tensor: on_cpu)
    model = compile(Chain(), cache=ALWAYS, inner_backend="eager")
    with torch.no_grad():
        for step in range(3):
            model(torch.randn(1, 4, 16), torch.tensor([1 - step / 4]))
    assert [options.inner_backend for options in begun] == ["eager"] * on_cpu


class ReadsBack(Chain):
    """One graph with the flags, none without: how many tokens there are is read from the data in every block."""

    def forward(self, x, timestep):
        temb = models.time_embedding(timestep)
        for block in self.blocks:
            length = int((timestep > 0).sum()) + 1
            torch._check(length >= 1)
            torch._check(length <= x.shape[1])
            x = block(x, temb) + x[:, :length].mean(1, keepdim=True)
        return x


class PicksTwice(Chain):
    """With the flags the two lengths are two unknowns, which the first block cannot know to be equal. Without, both are
    numbers before the blocks begin."""

    def prepare(self, x, timestep):
        x += 1
        keep = x[0, :, 0] > -1e9
        noised = x + 0.1 * torch.rand_like(x)
        return noised[:, keep] + x[:, ~(~keep)]


class Branches(Chain):
    """Two graphs: the timestep is an input of the first alone."""

    def forward(self, x, timestep):
        temb = models.time_embedding(timestep)
        if temb.sum() > 1e9:
            x = x * 2
        for block in self.blocks:
            x = block(x, temb)
        return x


def enabled(model, **options):
    return compile(model, inner_backend="eager", cache=ALWAYS, **options)


@torch.no_grad()
def test_the_flags_hold_in_the_call_and_nowhere_else():
    before, seen = flags(), []

    class Looks(Chain):
        def prepare(self, x, timestep):
            torch._dynamo.graph_break()
            look()
            return x

    look = torch.compiler.disable(lambda: seen.append(flags()))
    model = enabled(make(Looks))
    model(*models.inputs())
    assert [True, True] in seen and flags() == before
    with pytest.raises(TypeError):
        model()
    assert flags() == before


@torch.no_grad()
def test_lengths_read_from_the_data_stay_in_one_graph():
    model, inputs = make(ReadsBack), models.inputs()
    expected = model(*inputs)
    assert first_break(model, inputs, {}) is None
    enabled(model, enable_separate_cfg=False)
    assert torch.equal(model(*inputs), expected) and torch.equal(model(*inputs), expected)
    (region,) = summary(model)
    assert (region.num_blocks, region.cached_steps, region.uncached_calls) == (4, [1], 0)


@torch.no_grad()
def test_where_the_flags_do_harm_the_very_first_call_is_captured_without():
    """Random numbers that the first attempt drew are given back, and what it wrote to its inputs is undone."""
    model, inputs, again = make(PicksTwice), models.inputs(), models.inputs()
    again[0].copy_(inputs[0])
    torch.manual_seed(7)
    expected = model(*inputs)
    enabled(model, enable_separate_cfg=False)
    torch.manual_seed(7)
    assert torch.equal(model(*again), expected) and torch.equal(again[0], inputs[0])
    assert isinstance(model._compiled_call_impl.capturing, contextlib.nullcontext)
    model(*inputs)
    (region,) = summary(model)
    assert (region.num_blocks, region.executed_steps, region.cached_steps, region.uncached_calls) == (4, 2, [1], 0)
    assert explain(model, *inputs).chain == ("blocks",)


class Changes(Toy):
    """Changes what it holds and what it is given, before a capture that breaks among the blocks."""

    calls: Any
    sums: Any

    def __init__(self, blocks):
        super().__init__(blocks)
        self.calls, self.sums, self.latest, self.scale = 0, torch.zeros(()), [], nn.Parameter(torch.ones(()))
        self.table, self.queue = OrderedDict(inner={"calls": [0]}), deque([0], maxlen=2)
        self.counter = SimpleNamespace(calls=0, sums=torch.zeros(()))
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, hidden_states, timestep, encoder_hidden_states, given=None):
        self.calls += 1
        self.sums.add_(1.0)
        self.latest.append(self.calls)
        given["calls"].append(self.calls)
        self.table["inner"]["calls"].append(self.calls)
        self.queue.append(self.calls)
        self.counter.calls += 1
        self.counter.sums.add_(1.0)
        hidden_states = hidden_states + random.random() + torch.rand((), generator=self.generator)
        if self.writes:
            self.scale.mul_(0.5)
        torch.mul(hidden_states, 2.0, out=given["out"])
        hidden_states = hidden_states * self.scale
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, hidden_states[:, 0])
            torch._dynamo.graph_break()
        return hidden_states + self.sums


@torch.no_grad()
@pytest.mark.parametrize("writes", [False, True], ids=["", "parameter"])
def test_a_call_that_is_captured_twice_changes_everything_once(writes):
    """A parameter is not copied: then the first attempt's result counts."""
    found = []
    for is_enabled in (False, True):
        model = make(Changes, blocks=3)
        model.writes = writes
        if is_enabled:
            enabled(model)
        given = {"calls": [0], "out": torch.empty(0)}
        random.seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [model(noise(), torch.tensor([900.0]), noise(seed=2), given) for _ in range(2)]
        tensors = given["out"], model.sums, model.scale, model.counter.sums
        counts = model.calls, model.counter.calls, list(model.queue)
        found.append((results, tensors, counts, model.latest, given["calls"], model.table["inner"]["calls"]))
    (results, tensors, *plain), (ours, our_tensors, *counted) = found
    assert all(map(torch.equal, results, ours)) and all(map(torch.equal, tensors, our_tensors))
    assert plain == counted == [(2, 2, [1, 2]), [1, 2], [0, 1, 2], [0, 1, 2]]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "blocks"), [(Branches, [4]), (Halves, [4, 4])])
def test_graphs_of_one_call_share_its_timestep_and_step(kind, blocks):
    model = make(kind)
    x, timestep = models.inputs()
    expected = [model(x, timestep * scale) for scale in (1.0, 0.9, 0.8)]
    enabled(model)
    for _ in range(2):
        found = [model(x, timestep * scale) for scale in (1.0, 0.9, 0.8)]
        assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], expected[1])
        regions = summary(model)
        assert [region.num_blocks for region in regions] == blocks
        assert [region.name for region in regions] == [f"region_{number}" for number in range(len(blocks))]
        assert all((r.executed_steps, r.cached_steps, r.uncached_calls) == (3, [1, 2], 0) for r in regions)
        assert all(len(region.branches) == 1 for region in regions)
    assert any("2 graphs" in note and inspect.getfile(kind) in note for note in explain(model, x, timestep).notes)


@torch.no_grad()
def test_an_unknown_loop_is_an_error_of_the_options():
    model = enabled(make(Toy), loops=("layers",))
    with pytest.raises(OptionError, match=r"'layers'.*'blocks'"):
        model(noise(), torch.tensor([1.0]), noise(tokens=3))
    assert flags() == [False, False]


@torch.no_grad()
def test_the_warning_points_at_the_callers_line():
    class Breaks(Chain):
        def forward(self, x, timestep):
            temb = models.time_embedding(timestep)
            for block in self.blocks:
                x = block(x, temb)
                torch._dynamo.graph_break()
            return x

    model = enabled(make(Breaks))
    with pytest.warns(CacheWarning, match=r"test_compiled_call\.py:\d+, in forward, `torch\._dynamo\.graph") as caught:
        for _ in range(3):
            model(*models.inputs())
    (warning,) = caught
    assert warning.filename == __file__


def test_the_patch_may_be_entered_again_inside_itself():
    before, patch = flags(), capturing()
    with patch:
        with patch:
            assert flags() == [True, True]
        assert flags() == [True, True]
    assert flags() == before


class Refused(nn.Module):
    """Runs, but torch's fake tensors refuse one of its operations: for small inputs, with an even number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x, temb):
        change = nn.functional.gelu(self.linear(x)) + temb[:, None]
        return x + doubled(change)


@pytest.fixture(scope="module", autouse=True)
def refused_operation():
    """An operation whose shape function raises for an even number of tokens, as that of a kernel may for a dtype."""

    def shape(x):
        if x.shape[1] % 2 == 0:
            raise RuntimeError("no even number of tokens")
        return torch.empty_like(x)

    library = torch.library.Library("cachedit_test", "FRAGMENT")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: x * 2, "CPU")
    library.impl("doubled", shape, "Meta")
    yield
    library._destroy()


def doubled(x):
    return torch.ops.cachedit_test.doubled(x)


class Refuses(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Refused() for _ in range(4))

    def prepare(self, x, timestep):
        x += 1
        return x * 1 + torch.rand_like(x)


def refused_calls(model, *tokens):
    """For each number of tokens the result, the state of the inputs, and random numbers after the call."""
    results = []
    for number in tokens:
        x, timestep = torch.ones(1, number, models.WIDTH), torch.tensor([0.5])
        torch.manual_seed(number)
        results.append((model(x, timestep), x, torch.rand(1)))
    return results


@torch.no_grad()
@pytest.mark.parametrize("guards", ["always", "generation"])
@pytest.mark.parametrize("tokens", [(4, 4, 5, 5, 4), (5, 5, 4, 4, 5)], ids=["from the first call", "from a later call"])
def test_inputs_that_cannot_be_captured_run_uncached_and_right(tokens, guards):
    model = make(Refuses)
    expected = refused_calls(model, *tokens)
    enabled(model, enable_separate_cfg=False, guards=guards)
    with pytest.warns(
        CacheWarning, match=r"test_compiled_call\.py:\d+, in doubled.*no even number of tokens"
    ) as caught:
        results = refused_calls(model, *tokens)
    assert len([warning for warning in caught if issubclass(warning.category, CacheWarning)]) == 1
    for (result, x, number), (wanted, x_after, next_number), tokens_now in zip(results, expected, tokens, strict=True):
        assert torch.equal(x, x_after) and torch.equal(number, next_number)
        assert torch.equal(result, wanted) or tokens_now == 5  # such calls are cached, and the second one reuses
    assert torch.equal(results[tokens.index(5)][0], expected[tokens.index(5)][0])
    assert any(region.uncached_calls for region in summary(model))


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again(monkeypatch):
    model = enabled(make(Refuses), enable_separate_cfg=False)
    with pytest.warns(CacheWarning, match="no even number"):
        refused_calls(model, 4)
    call = model._compiled_call_impl
    monkeypatch.setattr(call, "compiled", lambda *args, **kwargs: pytest.fail("captured again"))
    refused_calls(model, 4)


@torch.no_grad()
def test_errors_of_the_plain_module_are_its_own_and_leave_no_trace():
    model = make(Refuses)
    wrong = torch.ones(1, 5, models.WIDTH + 1), torch.tensor([0.5])
    with pytest.raises(RuntimeError) as plain:
        model(*wrong)
    enabled(model, enable_separate_cfg=False)
    with pytest.raises(RuntimeError) as ours:
        model(*wrong)
    assert type(ours.value) is type(plain.value) and str(ours.value) == str(plain.value)
    refused_calls(model, 5, 5)
    (region,) = summary(model)
    assert (region.cached_steps, region.uncached_calls) == ([1], 0)


@torch.no_grad()
def test_fullgraph_raises_where_the_capture_fails():
    model = enabled(make(Refuses), fullgraph=True)
    with pytest.raises(TorchDynamoException, match="no even number"):
        refused_calls(model, 4)


@torch.no_grad()
def test_explain_names_the_line_that_cannot_be_captured():
    with pytest.raises(ValueError, match=r"test_compiled_call\.py:\d+, in doubled.*no even number"):
        explain(make(Refuses), torch.ones(1, 4, models.WIDTH), torch.tensor([0.5]))
