"""InferDependence: what a value says that it does not depend on, it does not depend on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lib import models, zoo
from lib.cases import graph_of
from lib.helpers import capture, copied, outcome_of
from lib.marks import SHARES_GRAPHS
from torch import fx, nn

from cachedit_fx.capture import capturing
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.find_timestep import FindTimestep, TimestepSource, source_name
from cachedit_fx.passes.graph_values import target_name
from cachedit_fx.passes.infer_dependence import Dependence, InferDependence, Level, Source
from cachedit_fx.passes.normalize import Normalize

pytestmark = SHARES_GRAPHS


def inferred(gm, sample="hidden_states"):
    """The graph, normalized, and the facts about it."""
    outcome = outcome_of(gm, Normalize(), FindTimestep(), InferDependence(sample))
    return outcome.graph_module, outcome.facts


class Recorder(fx.Interpreter):
    """Keeps every value that a graph makes."""

    def __init__(self, gm):
        super().__init__(gm)
        self.values = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


@torch.no_grad()
def values_of(gm, inputs):
    recorder = Recorder(gm)
    recorder.run(*copied(inputs))
    return recorder.values


def changed_inputs(gm, inputs, sources, source):
    """Inputs with other numbers in the tensors of this source. Of integers, which mostly index, timesteps alone."""

    def changed(node, value):
        if not isinstance(value, torch.Tensor) or source not in sources[node]:
            return value
        if value.is_floating_point():
            return value * 1.25 + 0.125
        return value + 1 if source is Source.TIME else value

    return list(map(changed, gm.graph.find_nodes(op="placeholder"), inputs))


def same(a, b):
    """Whether two values are equal to the bit; true for values within a mapped function, which have no numbers."""
    if not isinstance(a, torch.Tensor) or torch._C._functorch.is_batchedtensor(a):
        return True
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def is_unwritten(node):
    """Whether the node gives memory that nothing has written to yet."""
    return target_name(node) in ("empty", "empty_like", "new_empty", "empty_strided")


def assert_independent(gm, facts, inputs):
    """Change the inputs of one source after another: values without this source stay as they are, to the bit."""
    sources = facts[Dependence].sources
    before = values_of(gm, inputs)
    for source in (Source.SAMPLE, Source.TIME, Source.CONDITION):
        others = changed_inputs(gm, inputs, sources, source)
        after = values_of(gm, others)
        changed = {node for node, value in before.items() if not same(value, after[node]) and not is_unwritten(node)}
        assert bool(changed) is any(one is not other for one, other in zip(inputs, others, strict=True)), source
        wrong = [node.name for node in changed if source not in sources[node]]
        assert not wrong, (source, wrong)


@pytest.mark.parametrize("case", [models.flux, models.sd3, models.wan])
def test_values_change_with_their_sources_alone(case):
    graph = graph_of(case)
    gm, facts = inferred(graph.gm)
    assert_independent(gm, facts, graph.inputs)


def graphs_of(module, inputs):
    """Every graph of a call, with its inputs: some classes break the capture outside their blocks."""
    graphs = []

    def backend(gm, example_inputs):
        def run(*values):
            graphs.append((gm, copied(values)))
            return gm(*values)

        return run

    torch._dynamo.reset()
    with torch.no_grad(), capturing():
        torch.compile(module, backend=backend)(**inputs)
    return graphs


@pytest.mark.full("zoo")
@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - set(zoo.SHORT)))
def test_values_of_every_class_change_with_their_sources_alone(name):
    module, inputs = zoo.ZOO[name]()
    largest, checked = 0, 0
    for captured, values in graphs_of(module, inputs(1)):
        gm, facts = inferred(captured, Traced.of(module).sample)
        if Dependence in facts:
            assert_independent(gm, facts, values)
            checked = max(checked, len(gm.graph.nodes))
        largest = max(largest, len(gm.graph.nodes))
    assert checked == largest, "the graph with the blocks has a sample"


def test_weights_are_shared_out_by_what_they_serve():
    """The modulation of the blocks is the timestep's; nothing of the toy is the text's."""
    model = models.Toy()
    gm, facts = inferred(capture(model, *models.inputs()).gm)
    dependence = facts[Dependence]
    assert sum(dependence.weights.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert dependence.weights[Level.CONDITIONS] == dependence.weights[Level.WEIGHTS] == 0
    assert 0 <= dependence.share(Level.TIME) < dependence.share(Level.SAMPLE) < 1 + 1e-9
    assert dependence.timed_weights == dependence.weights[Level.TIME]


class Mixed(nn.Module):
    """One value of each kind."""

    table: torch.Tensor
    count: torch.Tensor

    def __init__(self):
        super().__init__()
        self.modulation, self.key, self.mixed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        modulation = self.modulation(timestep.expand(4))
        key = self.key(encoder_hidden_states)
        table = self.table * 2
        zeros = torch.zeros_like(hidden_states) + table
        self.count += timestep
        filled = encoder_hidden_states.new_empty(4)
        filled[:2] = hidden_states[0, :2]
        filled[2:] = 1
        noise = torch.rand(4)
        dropped, kept = F.dropout(table, 0.5, True), F.dropout(table, 0.5, False)
        both = self.mixed(modulation) + self.mixed(hidden_states)
        cast = table.to(hidden_states.dtype).type_as(hidden_states)
        counted, written = self.count * 3, filled * 3
        late = modulation * key[0]
        return modulation, key, table, zeros, counted, written, noise * 1, dropped, kept, both, cast, late


def test_each_kind_of_value():
    names = [
        "modulation",
        "key",
        "table",
        "zeros",
        "counted",
        "written",
        "noise",
        "dropped",
        "kept",
        "both",
        "cast",
        "late",
    ]
    inputs: dict[str, Any] = {
        "hidden_states": torch.ones(2, 4),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.ones(2, 4),
    }
    gm, facts = inferred(capture(Mixed().eval(), **inputs).gm)
    dependence = facts[Dependence]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    levels = {name: dependence.level(node) for name, node in zip(names, output.args[0], strict=False)}
    assert levels == {
        "modulation": Level.TIME,
        "key": Level.CONDITIONS,
        "table": Level.WEIGHTS,
        "zeros": Level.CONDITIONS,
        "counted": Level.TIME,
        "written": Level.SAMPLE,
        "noise": Level.SAMPLE,
        "dropped": Level.SAMPLE,
        "kept": Level.WEIGHTS,
        "both": Level.SAMPLE,
        "cast": Level.WEIGHTS,
        "late": Level.TIME,
    }
    late, modulation = output.args[0][names.index("late")], output.args[0][names.index("modulation")]
    assert dependence.sources[late] == Source.TIME | Source.CONDITION and dependence.sources[modulation] is Source.TIME
    assert dependence.weights == {Level.WEIGHTS: 0, Level.CONDITIONS: 20, Level.TIME: 20, Level.SAMPLE: 20}


def test_lengths_that_depend_on_data_stay_in_their_place():
    class Selects(nn.Module):
        def forward(self, hidden_states, timestep, mask):
            return hidden_states * timestep, mask[mask > 0] * 2

    with capturing():
        graph = capture(Selects(), hidden_states=torch.ones(1, 4, 4), timestep=torch.ones(1), mask=torch.ones(4))
    gm, facts = inferred(graph.gm)
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    assert facts[Dependence].level(output.args[0][1]) is Level.SAMPLE


def test_a_list_of_samples_is_the_sample():
    class Lists(nn.Module):
        def forward(self, x, timestep):
            return [each * timestep for each in x]

    gm, facts = inferred(capture(Lists(), [torch.ones(3), torch.ones(4)], torch.ones(1)).gm, "x")
    inputs = gm.graph.find_nodes(op="placeholder")
    samples = [node for node in inputs if facts[Dependence].sources[node] is Source.SAMPLE]
    assert {source_name(node) for node in samples} == {"x_0", "x_1"}


def test_without_a_sample_nothing_is_known():
    class Numbers(nn.Module):
        def forward(self, timestep):
            return timestep * 2

    _, facts = inferred(capture(Numbers(), torch.ones(1)).gm, "x")
    assert Dependence not in facts and TimestepSource in facts
