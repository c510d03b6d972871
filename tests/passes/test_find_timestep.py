"""FindTimestep: by name, by use, as a number that the trace baked in."""

import pytest
import torch
from lib import models
from lib.cases import graph_of
from lib.helpers import capture, ops, outcome_of
from lib.marks import SHARES_GRAPHS
from torch import nn

from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.find_timestep import FindTimestep, TimestepSource

pytestmark = SHARES_GRAPHS


def source_of(gm, argument=None, numbers=None):
    return outcome_of(gm, FindTimestep(argument, numbers)).facts.get(TimestepSource)


def tensor_at(graph, source):
    return graph.inputs[source.input_index]


class Named(nn.Module):
    """Uses of time under other names: what is called `emb` reaches the sine, `speed` does not."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, emb, speed):
        angles = (emb.float() * 1000)[:, None] * torch.arange(8)
        return x * speed + torch.cat([angles.sin(), angles.cos()], -1)[:, None] * (self.scale * 2).sin()


@pytest.mark.parametrize("case", [models.flux, models.sd3, models.wan])
def test_by_name(case):
    _, inputs = case()
    graph = graph_of(case)
    before = ops(graph.gm)
    source = source_of(graph.gm)
    assert source.name == "timestep" and source.constant is None
    assert torch.equal(tensor_at(graph, source), inputs["timestep"])
    assert ops(graph.gm) == before


def test_by_use():
    graph = capture(Named(), torch.randn(1, 6, 16), torch.tensor([7.0]), torch.tensor([3.0]))
    assert tensor_at(graph, source_of(graph.gm)).item() == 7.0


def test_weights_and_large_inputs_are_not_taken():
    """The parameter reaches a sine too, and so do rotary angles, and pooled embeddings behind a product of matrices."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(1))

        def forward(self, x, angles, pooled):
            return x * self.phase.sin() + angles.sin() + (pooled @ x.T).cos()[:, None]

    gm = capture(Other(), torch.randn(6, 16), torch.randn(6, 16), torch.randn(16)).gm
    assert source_of(gm) is None


def test_option_names_the_argument():
    gm = capture(Named(), torch.randn(1, 6, 16), torch.tensor([7.0]), torch.tensor([3.0])).gm
    assert source_of(gm, "speed").name == "speed"
    # No other input is taken in its place.
    assert source_of(gm, "sigma") is None


def test_python_number_is_a_constant():
    class Numbered(nn.Module):
        def forward(self, x, timestep):
            return x * timestep

    gm = capture(Numbered(), torch.randn(1, 6, 16), 0.5).gm
    assert source_of(gm, numbers={"timestep": 0.5, "guidance": 3.0}) == TimestepSource("timestep", constant=0.5)
    assert source_of(gm, "guidance", {"guidance": 3.0}) == TimestepSource("guidance", constant=3.0)
    assert source_of(gm) is None


def test_an_input_goes_before_a_number():
    graph = capture(models.Toy(), *models.inputs(timestep=42.0))
    source = source_of(graph.gm, numbers={"t": 3})
    assert tensor_at(graph, source).item() == 42.0


def test_keyword_arguments():
    class Keywords(nn.Module):
        def forward(self, x, **kwargs):
            return x * kwargs["timestep"].cos()

    graph = capture(Keywords(), torch.randn(1, 6, 16), timestep=torch.tensor([9.0]))
    source = source_of(graph.gm)
    assert source.name == "timestep" and tensor_at(graph, source).item() == 9.0


def test_no_match():
    gm = capture(nn.Linear(16, 16), torch.randn(1, 16)).gm
    assert FindTimestep().run(gm, Facts()) is None


def test_dynamic_shapes():
    """Sizes are inputs too, and shift the index."""
    graph = capture(models.Toy(), *models.inputs(batch=2, timestep=42.0), dynamic=True)
    source = source_of(graph.gm)
    assert any(isinstance(value, int) for value in graph.inputs)
    assert tensor_at(graph, source).tolist() == [42.0, 42.0]
