"""The call of a compiled module: dynamo's flags for itself alone, several graphs that are one call, another capture."""

import contextlib
import inspect

import pytest
import torch
from lib import models
from lib.cases import Chain, Halves
from lib.toys import Toy, make, noise

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
