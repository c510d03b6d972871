"""Regions: limits, bases, what is stored whole, what is hoisted, what is refused."""

from contextlib import nullcontext

import pytest
import torch
from lib import models
from lib.cases import ALL, graph_of
from lib.helpers import capture, copied, detected, ops, planned
from lib.marks import SHARES_GRAPHS
from torch import fx, nn

from cachedit_fx.passes.graph_values import target_name

pytestmark = SHARES_GRAPHS


def text(tokens=5):
    return torch.randn(1, tokens, models.WIDTH)


def toy(blocks=4):
    return graph_of(ALL["plain"]) if blocks == 4 else capture(models.Toy(blocks), *models.inputs())


def names(nodes):
    return [target_name(node) for node in nodes]


def values(graph):
    """Every value of the flat graph, by node."""
    found = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            found[node] = super().run_node(node)
            return found[node]

    with torch.no_grad():
        Recorder(graph.gm).run(*copied(graph.inputs))
    return found


def bases(continuation, known):
    """The results of a continuation's graph."""
    with torch.no_grad():
        return fx.GraphModule({}, continuation.graph)(*(known[node] for node in continuation.inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, last, middle", [(1, 0, 3), (1, 2, 1), (3, 0, 1), (0, 0, 4), (0, 3, 1), (2, 1, 1)])
def test_first_and_last_blocks_are_left_out(first, last, middle):
    graph = toy()
    before = ops(graph.gm)
    report = planned(graph.gm, first, last)
    assert report.refusals == ()
    (region,) = report.regions
    assert (region.name, region.loops, region.num_blocks) == ("region_0", ("blocks",), 4)
    assert len(region.middle) == middle
    assert (region.start, region.end) == (region.middle[0].start, region.middle[-1].end)
    assert region.continued == (True,)
    assert (region.hidden_out is None) == (first == 0)
    if first:
        assert region.hidden_out in region.blocks[first - 1].live_outs
    assert ops(graph.gm) == before


@pytest.mark.parametrize("first, last", [(4, 0), (1, 3), (0, 4), (8, 0)])
def test_nothing_left_to_bypass(first, last):
    report = planned(toy().gm, first, last)
    assert report.regions == ()
    assert report.refusals == (
        f"blocks: Fn_compute_blocks + Bn_compute_blocks = {first} + {last} leaves nothing to bypass of 4 blocks; "
        "choose a sum below 4",
    )


def test_blocks_are_numbered_over_the_whole_chain():
    graph = graph_of(ALL["two loops"])
    (region,) = planned(graph.gm, 5, 1).regions
    assert [block.name for block in region.middle] == ["single_blocks.2"]
    assert region.loops == ("double_blocks", "single_blocks")


def test_one_region_for_each_loop():
    graph = graph_of(ALL["two loops"])
    report = planned(graph.gm, 1, 1, "loop")
    assert [(r.name, r.loops, len(r.middle)) for r in report.regions] == [
        ("region_0", ("double_blocks",), 1),
        ("region_1", ("single_blocks",), 2),
    ]
    report = planned(graph.gm, 3, 0, "loop")
    assert [r.loops for r in report.regions] == [("single_blocks",)]
    assert len(report.refusals) == 1 and report.refusals[0].startswith("double_blocks: ")


def test_no_loop_no_region():
    report = planned(capture(nn.Linear(4, 4), torch.randn(2, 4)).gm, 1, 0)
    assert (report.regions, report.refusals) == ((), ())


# ---------------------------------------------------------------------------------------------------------------------
# Bases
# ---------------------------------------------------------------------------------------------------------------------


def test_base_of_a_plain_chain_is_what_enters():
    graph = toy()
    (region,) = planned(graph.gm, 2, 1).regions
    (loop,) = detected(graph.gm).loops
    (stream,) = loop.carried
    assert region.bases.is_trivial
    assert region.bases.inputs == (stream.inputs[2],) and region.live_outs == (stream.outputs[2],)
    assert region.reference is not None and region.reference.is_trivial
    # r = H_F - H_in over all first blocks, not over the last of them.
    assert region.reference.inputs == (stream.inputs[0],) and region.hidden_out is stream.outputs[1]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_glue_is_replayed(first):
    """Text and image are concatenated between the loops: the base of the joint stream is both, concatenated."""
    graph = graph_of(ALL["two loops"])
    (region,) = planned(graph.gm, first, 0).regions
    known = values(graph)
    (base,) = bases(region.bases, known)
    double, _ = detected(graph.gm).loops
    text_stream, image = double.carried
    entering = [known[text_stream.inputs[first]], known[image.inputs[first]]] if first < 3 else None
    if entering is None:
        entering = [known[text_stream.outputs[2]], known[image.outputs[2]]]
    assert torch.equal(base, torch.cat(entering, 1))
    assert not region.bases.is_trivial or first == 3
    assert [n.target for n in region.bases.graph.nodes if n.op == "call_function"] == [torch.cat]
    assert known[region.live_outs[0]].shape == base.shape


def test_reference_behind_the_glue():
    graph = graph_of(ALL["two loops"])
    (region,) = planned(graph.gm, 4, 0).regions
    known = values(graph)
    (reference,) = bases(region.reference, known)
    double, _ = detected(graph.gm).loops
    assert torch.equal(reference, torch.cat([known[stream.inputs[0]] for stream in double.carried], 1))


@pytest.mark.parametrize("first, last", [(1, 0), (3, 1), (4, 2)])
def test_flux(first, last):
    graph = graph_of(models.flux)
    (region,) = planned(graph.gm, first, last).regions
    assert all(region.continued)
    known = values(graph)
    for value, base in zip(region.live_outs, bases(region.bases, known), strict=True):
        assert known[value].shape == base.shape and known[value].dtype == base.dtype
    (reference,) = bases(region.reference, known)
    # The image stream, not the text's.
    assert known[region.hidden_out].shape == reference.shape == (1, 16, 16)


def test_last_block_that_drops_a_stream():
    graph = graph_of(ALL["last differs"])
    (region,) = planned(graph.gm, 1, 0).regions
    assert region.continued == (True,) and len(region.live_outs) == 1
    (region,) = planned(graph.gm, 1, 1).regions
    assert region.continued == (True, True)


def test_skips_into_the_tail_are_continued():
    """What a bypassed block hands across the chain is what it hands to the next one."""
    graph = capture(models.UShaped(7), *models.inputs())
    (region,) = planned(graph.gm, 1, 2).regions
    assert region.continued == (True, True)
    assert region.bases.inputs == (region.hidden_out,)


def test_what_continues_nothing_is_stored_whole():
    (region,) = planned(graph_of(ALL["stored whole"]).gm, 1, 1).regions
    assert sorted(zip(names(region.live_outs), region.continued, strict=True)) == [
        ("add", True),
        ("mean", False),
        ("mean", False),
    ]


def test_what_depends_on_no_stream_is_hoisted():
    (region,) = planned(graph_of(ALL["hoisted"]).gm, 1, 0).regions
    assert names(region.hoisted) == ["mul", "tanh", "getitem"]
    assert region.continued == (True,) and names(region.live_outs) == ["add"]
    (region,) = planned(graph_of(ALL["hoisted"]).gm, 3, 0).regions
    assert region.hoisted == ()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


class Records(models.Toy):
    """Blocks write to a buffer that was made before them."""

    def forward(self, hidden_states, timestep):
        temb, x = models.time_embedding(timestep), self.embed(hidden_states)
        record = torch.zeros(4)
        for index, block in enumerate(self.blocks):
            x = block(x, temb)
            record[index] = x.mean()
        return self.project(x), record


def test_writes_to_the_outside_are_refused():
    report = planned(capture(Records(), *models.inputs()).gm, 1, 0)
    assert report.regions == ()
    assert "writes in place to record, made outside the region" in report.refusals[0]


def test_writes_inside_are_not():
    class Local(models.Block):
        def forward(self, x, temb):
            rotated = torch.empty_like(x)
            rotated[..., 0::2], rotated[..., 1::2] = x[..., 1::2], -x[..., 0::2]
            return super().forward(x + rotated, temb)

    class Rotating(models.Toy):
        def make_block(self, index, width):
            return Local()

    assert len(planned(capture(Rotating(), *models.inputs()).gm, 1, 0).regions) == 1


def test_blocks_made_pure_are_not():
    assert len(planned(graph_of(ALL["in place"]).gm, 1, 0).regions) == 1


class Autocast(models.Toy):
    """Autocast around the whole loop, or around each block."""

    def __init__(self, around):
        super().__init__()
        self.around = around

    def forward(self, hidden_states, timestep):
        temb, x = models.time_embedding(timestep), self.embed(hidden_states)
        with torch.autocast("cpu", torch.bfloat16) if self.around == "loop" else nullcontext():
            for block in self.blocks:
                if self.around == "block":
                    with torch.autocast("cpu", torch.bfloat16):
                        x = block(x, temb)
                else:
                    x = block(x, temb)
            x = x * 2
        return self.project(x.float())


def test_context_across_the_border_is_refused():
    report = planned(capture(Autocast("loop"), *models.inputs()).gm, 1, 0)
    assert report.regions == ()
    assert "opens a context (autocast, grad mode) that spans its border" in report.refusals[0]


def test_dynamic_shapes():
    graph = capture(models.TwoLoops(), *models.inputs(batch=2), torch.randn(2, 5, 16), dynamic=True)
    (region,) = planned(graph.gm, 1, 0).regions
    (base,) = bases(region.bases, values(graph))
    assert base.shape == (2, 11, 16)


def test_context_inside_each_block_is_not():
    (region,) = planned(capture(Autocast("block"), *models.inputs()).gm, 1, 0).regions
    assert len(region.middle) == 3
    assert sum(name == "_enter_autocast" for block in region.middle for name in names(block.nodes)) == 3
