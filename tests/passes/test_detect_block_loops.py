"""Detection: loops by names, by structure alone, the chain, the hidden-states stream, the classes of values."""

import pytest
import torch
import torch.nn.functional as F
from lib import models
from lib.cases import ALL, graph_of
from lib.helpers import capture, detected, find, ops
from lib.marks import SHARES_GRAPHS, only_in
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from cachedit_fx.passes.block_loops import LoopNotFound
from cachedit_fx.passes.graph_values import body_nodes, target_name
from cachedit_fx.passes.loops_by_name import module_path

pytestmark = SHARES_GRAPHS


def text(batch=1, tokens=5):
    return torch.randn(batch, tokens, models.WIDTH)


def in_sequential():
    return models.InSequential(), models.inputs()


def found(detection):
    """(name, blocks) of every loop."""
    return [(loop.name, loop.num_blocks) for loop in detection.loops]


def sizes(loop):
    return [block.num_nodes for block in loop.blocks]


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, name",
    [
        (ALL["plain"], "blocks"),
        (in_sequential, "blocks"),
        (lambda: (models.InDict(), models.inputs()), "blocks.b"),
        (lambda: (models.Numbered(), models.inputs()), "block"),
        (lambda: (models.Numbered(pattern="block_{}"), models.inputs()), "block"),
        (ALL["shared"], "blocks"),
    ],
    ids=["ModuleList", "Sequential", "ModuleDict", "block0", "block_0", "one block called four times"],
)
def test_containers(make, name):
    graph = graph_of(make)
    before = ops(graph.gm)
    detection = detected(graph.gm)
    assert found(detection) == [(name, 4)]
    (loop,) = detection.loops
    assert loop.evidence == "names"
    assert len(set(sizes(loop))) == 1
    assert [(c.shape, c.dtype) for c in loop.carried] == [((1, 6, models.WIDTH), torch.float32)]
    assert (detection.chain, detection.hidden) == ((0,), (0,))
    # Each block takes what the one before it handed on.
    (carried,) = loop.carried
    assert carried.outputs[:-1] == carried.inputs[1:]
    for block, into, out in zip(loop.blocks, carried.inputs, carried.outputs, strict=True):
        assert into in block.live_ins and out in block.live_outs
    assert ops(graph.gm) == before


def test_module_paths():
    raw = "L['self'].__dict__['_modules']['blocks']._modules['3'].attn"
    assert module_path(raw) == "blocks.3.attn"
    assert module_path("L['self'].layers[2]") == "layers.2"


def test_feed_forward_list_inside_a_block_is_not_the_loop():
    graph = graph_of(ALL["plain"])
    stacks = [node.meta.get("nn_module_stack") or {} for node in body_nodes(graph.gm.graph)]
    paths = {module_path(entry[0]) for stack in stacks for entry in stack.values()}
    assert "blocks.0.ff.2" in paths
    assert found(detected(graph.gm)) == [("blocks", 4)]


@pytest.mark.parametrize("case", ["two loops", "no glue"])
def test_two_loops_in_sequence(case):
    graph = graph_of(ALL[case])
    detection = detected(graph.gm)
    assert found(detection) == [("double_blocks", 3), ("single_blocks", 4)]
    assert (detection.chain, detection.hidden) == ((0, 1), (1, 0))
    double, single = detection.loops
    assert [c.shape[1] for c in double.carried] == [5, 6]
    assert [c.shape[1] for c in single.carried] == [11 if case == "two loops" else 6]
    between = body_nodes(graph.gm.graph)[double.end : single.start]
    assert [target_name(node) for node in between] == (["cat"] if case == "two loops" else [])


def test_refiners_belong_to_the_prologue():
    graph = graph_of(ALL["refiners"])
    detection = detected(graph.gm)
    assert found(detection) == [("refiners", 2), ("blocks", 8)]
    assert detection.chain == (1,)
    (note,) = detection.notes
    assert "refiners is left out" in note and "% of blocks's" in note


@pytest.mark.parametrize("text_first", [True, False])
def test_text_blocks_beside_the_image_blocks_are_not_in_the_chain(text_first):
    """Both run into the blocks behind them; the difference is to be measured on the hidden states."""
    graph = capture(models.Parallel(text_first=text_first), *models.inputs(), text())
    detection = detected(graph.gm)
    assert sorted(found(detection)) == [("image_blocks", 3), ("single_blocks", 4), ("text_blocks", 3)]
    assert [loop.name for loop in detection.chain_loops] == ["image_blocks", "single_blocks"]
    (note,) = detection.notes
    assert note == "text_blocks is left out of the chain: the hidden states do not run through it"


def test_option_chooses_the_chain():
    graph = graph_of(ALL["refiners"])
    assert detected(graph.gm, loops=["blocks", "refiners"]).chain == (0, 1)
    assert detected(graph.gm, loops=["refiners"]).chain == (0,)
    with pytest.raises(LoopNotFound, match=r"is called 'layers'; this graph has \['blocks', 'refiners'\]"):
        detected(graph.gm, loops=["layers"])


def test_loop_that_feeds_nothing_into_the_chain_is_left_out():
    class SideBranch(models.Toy):
        def __init__(self):
            super().__init__()
            self.side = nn.ModuleList(models.Block() for _ in range(3))

        def forward(self, hidden_states, timestep):
            temb, y = models.time_embedding(timestep), hidden_states
            for block in self.side:
                y = block(y, temb)
            return super().forward(hidden_states, timestep), y

    detection = detected(capture(SideBranch(), *models.inputs()).gm)
    assert found(detection) == [("side", 3), ("blocks", 4)]
    assert detection.chain == (1,)
    assert "side is left out" in detection.notes[0] and "does not become" in detection.notes[0]


def test_last_block_that_drops_the_text_stream():
    graph = graph_of(ALL["last differs"])
    (loop,) = detected(graph.gm).loops
    assert loop.num_blocks == 4 and sizes(loop)[3] < sizes(loop)[0]
    by_length = {carried.shape[1]: carried for carried in loop.carried}
    assert by_length[5].outputs[3] is None and None not in by_length[5].outputs[:3]
    assert None not in by_length[6].outputs


def test_members_of_one_class_are_blocks_however_unlike():
    class Deep(models.Block):
        depth = 0

        def forward(self, x, temb):
            for _ in range(self.depth):
                x = x + torch.tanh(x)
            return super().forward(x, temb)

    model = models.Toy(2)
    model.blocks = nn.ModuleList([Deep(), Deep()])
    model.blocks[1].depth = 40
    detection = detected(capture(model, *models.inputs()).gm)
    assert found(detection) == [("blocks", 2)] and detection.chain == (0,)


def test_blocks_too_small_or_unlike_are_no_loop():
    class Unlike(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([models.Block(), models.Attention()])

        def forward(self, x, t):
            return self.layers[1](self.layers[0](x, models.time_embedding(t)))

    assert found(detected(capture(Unlike(), *models.inputs()).gm)) == []


@pytest.mark.parametrize("use_names", [True, False])
def test_linear_and_relu_are_no_loop(use_names):
    """Two operations are no block, however often they stand one behind the other: a repeat of four is one of two."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
    graph = capture(nn.Sequential(*layers), torch.randn(1, 6, 16))
    assert len(find(graph.gm, "linear")) == 8
    detection = detected(graph.gm, use_names=use_names)
    assert found(detection) == [] and detection.chain == ()
    assert detection.notes and "no block loop" in detection.notes[0]


@pytest.mark.parametrize("use_names", [True, False])
def test_blocks_that_change_their_width_are_no_loop(use_names):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(models._Plain(w), nn.Linear(w, 2 * w)) for w in (8, 16, 32))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    assert found(detected(capture(Pyramid(), torch.randn(1, 6, 8)).gm, use_names=use_names)) == []


@pytest.mark.parametrize("use_names", [True, False])
def test_parallel_branches_are_no_loop(use_names):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(models._Plain(16) for _ in range(4))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    assert found(detected(capture(Experts(), torch.randn(1, 6, 16)).gm, use_names=use_names)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def test_invariant_and_per_block_values():
    graph = graph_of(ALL["plain"])
    (loop,) = detected(graph.gm).loops
    assert [target_name(node) for node in loop.invariant] == ["cat"]  # the time embedding
    weights = {node for node in loop.per_block if isinstance(node.meta["example_value"], nn.Parameter)}
    assert len(weights) == len(loop.per_block) == 4 * 12
    assert loop.skips == ()


def test_weights_shared_by_all_calls_are_invariant():
    graph = graph_of(ALL["shared"])
    (loop,) = detected(graph.gm).loops
    assert loop.per_block == () and len(loop.invariant) == 1 + 12


def test_controlnet_residuals_are_per_block():
    x, t = models.inputs()
    residuals = [torch.randn_like(x) for _ in range(4)]
    graph = capture(models.Controlled(), x, t, residuals)
    (loop,) = detected(graph.gm).loops
    inside = {node for block in loop.blocks for node in block.nodes}
    for name in ("l_residuals_0_", "l_residuals_1_", "l_residuals_2_", "l_residuals_3_"):
        (value,) = (node for node in loop.per_block if node.name == name)
        assert set(value.users) <= inside, "the addition belongs to the block before it"
    assert len(set(sizes(loop))) == 1
    (carried,) = loop.carried
    for out in carried.outputs:
        assert out is not None and target_name(out) == "add"
        assert any("residuals" in item.name for item in out.all_input_nodes)


def test_skips_across_the_chain():
    graph = capture(models.UShaped(7), *models.inputs())
    (loop,) = detected(graph.gm).loops
    assert loop.num_blocks == 7
    assert sorted((made, taken) for _, made, taken in loop.skips) == [(0, 6), (1, 5), (2, 4)]
    (carried,) = loop.carried
    assert all(value is carried.outputs[made] for value, made, _ in loop.skips)


def test_hidden_stream_is_the_one_made_from_the_sample():
    """Though the text stream is longer here, and comes first."""
    graph = capture(models.TwoLoops(), *models.inputs(tokens=6), text(tokens=40))
    detection = detected(graph.gm)
    lengths = [loop.carried[slot].shape[1] for loop, slot in zip(detection.chain_loops, detection.hidden, strict=True)]
    assert lengths == [6, 46]


# ---------------------------------------------------------------------------------------------------------------------
# Structure alone
# ---------------------------------------------------------------------------------------------------------------------


def test_plain_functions():
    x, temb = torch.randn(1, 6, 16), torch.randn(1, 16)
    detection = detected(capture(models.functional, models.functional_weights(5), x, temb).gm)
    assert found(detection) == [("loop_0", 5)]
    (loop,) = detection.loops
    assert loop.evidence == "structure" and detection.chain == (0,)
    # The time embedding is unsqueezed in each block: the embedding itself enters them all.
    assert [node.name for node in loop.invariant] == ["l_temb_"]
    assert len(loop.carried) == 1 and loop.carried[0].outputs[:-1] == loop.carried[0].inputs[1:]


def test_plain_list_of_blocks():
    blocks = [models.Block() for _ in range(4)]

    def forward(x, timestep):
        temb = models.time_embedding(timestep)
        for block in blocks:
            x = block(x, temb)
        return x

    for use_names in (True, False):
        (loop,) = detected(capture(forward, *models.inputs()).gm, use_names=use_names).loops
        assert loop.num_blocks == 4


@pytest.mark.parametrize(
    "make, blocks",
    [
        (ALL["plain"], [4]),
        (in_sequential, [4]),
        (ALL["shared"], [4]),
        (ALL["in place"], [4]),
        (ALL["two loops"], [3, 4]),
        (ALL["refiners"], [2, 8]),
        (lambda: (models.Controlled(), (*models.inputs(), [torch.randn(1, 6, 16) for _ in range(4)])), [4]),
    ],
    ids=["ModuleList", "Sequential", "shared", "in place", "two loops", "refiners", "ControlNet"],
)
def test_structure_finds_what_names_find(make, blocks):
    gm = graph_of(make).gm
    named, bare = detected(gm), detected(gm, use_names=False)
    assert [loop.num_blocks for loop in bare.loops] == [loop.num_blocks for loop in named.loops] == blocks
    assert {loop.evidence for loop in bare.loops} == {"structure"}
    assert (bare.chain, bare.hidden) == (named.chain, named.hidden)
    for loop, twin in zip(bare.loops, named.loops, strict=True):
        assert sizes(loop) == sizes(twin)
        assert len(loop.carried) == len(twin.carried)


CLASSES = [
    (models.qwen_image, "transformer_blocks", 4, 2),
    (models.wan, "blocks", 4, 1),
    (models.cogvideox, "transformer_blocks", 4, 2),
    (models.pixart, "transformer_blocks", 4, 1),
    (models.sana, "transformer_blocks", 4, 1),
    (models.ltx, "transformer_blocks", 4, 1),
]


@pytest.mark.parametrize("case, name, blocks, streams", only_in("zoo", CLASSES, but=CLASSES[:2]))
def test_diffusers_classes_by_names_and_by_structure(case, name, blocks, streams):
    graph = graph_of(case)
    for use_names in (True, False):
        detection = detected(graph.gm, use_names=use_names)
        assert found(detection) == [(name if use_names else "loop_0", blocks)]
        (loop,) = detection.loops
        assert len(loop.carried) == streams and detection.chain == (0,)
        image = max(carried.shape[1] for carried in loop.carried)
        assert loop.carried[detection.hidden[0]].shape[1] == image
    assert graph.same(graph.gm)


def test_flux():
    graph = graph_of(models.flux)
    detection = detected(graph.gm)
    assert found(detection) == [("transformer_blocks", 3), ("single_transformer_blocks", 4)]
    assert detection.chain == (0, 1)
    for loop, slot in zip(detection.chain_loops, detection.hidden, strict=True):
        assert sorted(carried.shape[1] for carried in loop.carried) == [6, 16]
        assert loop.carried[slot].shape[1] == 16
    # The last block hands no text on: that one operation is missing there does not end the loop before it.
    assert [loop.num_blocks for loop in detected(graph.gm, use_names=False).loops] == [3, 4]


def test_sd3():
    graph = graph_of(models.sd3)
    detection = detected(graph.gm)
    assert found(detection) == [("transformer_blocks", 4)]
    (loop,) = detection.loops
    hidden = loop.carried[detection.hidden[0]]
    (other,) = (carried for carried in loop.carried if carried is not hidden)
    assert (hidden.shape[1], other.shape[1]) == (16, 5)
    assert None not in hidden.outputs and other.outputs[-1] is None
    # The last block drops the text and is much shorter, yet structure tells that it goes on as the others do.
    (bare,) = detected(graph.gm, use_names=False).loops
    assert sizes(bare) == sizes(loop)
    assert [carried.outputs[-1] is None for carried in bare.carried] == [carried is other for carried in loop.carried]


def test_hunyuan_dit():
    (loop,) = detected(graph_of(models.hunyuan_dit).gm).loops
    assert (loop.name, loop.num_blocks) == ("blocks", 8)
    assert sorted((made, taken) for _, made, taken in loop.skips) == [(0, 7), (1, 6), (2, 5)]


def test_make_fx():
    weights, x, temb = models.functional_weights(4), torch.randn(1, 6, 16), torch.randn(1, 16)
    gm = make_fx(models.functional, tracing_mode="fake")(weights, x, temb)
    (loop,) = detected(gm).loops
    assert (loop.num_blocks, len(loop.carried), loop.evidence) == (4, 1, "structure")


@pytest.mark.parametrize("use_names", [True, False])
def test_export(use_names):
    program = torch.export.export(models.Toy(), models.inputs())
    (loop,) = detected(program.graph_module, use_names=use_names).loops
    assert (loop.name, loop.num_blocks) == (("blocks", 4) if use_names else ("loop_0", 4))


def test_dynamic_shapes():
    graph = capture(models.Toy(), *models.inputs(batch=2, tokens=6), dynamic=True)
    for use_names in (True, False):
        (loop,) = detected(graph.gm, use_names=use_names).loops
        assert loop.num_blocks == 4
        assert isinstance(loop.carried[0].shape[1], torch.SymInt)


def test_costs_count_the_work():
    (loop,) = detected(graph_of(in_sequential).gm).loops
    products = 4 * (2 * 6 * 16 * (48 + 16) + 4 * 6 * 6 * 16)
    assert products < loop.cost < 1.5 * products


def test_costs_of_aten_graphs_are_the_same():
    def forward(x, weights, bias):
        for weight in weights:
            x = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]) * 2, weight, bias))
        return x

    inputs = torch.randn(6, 16), [torch.randn(16, 16) for _ in range(4)], torch.randn(16)
    (loop,) = detected(capture(forward, *inputs).gm).loops
    (aten,) = detected(make_fx(forward, tracing_mode="fake")(*inputs)).loops
    assert aten.num_blocks == loop.num_blocks == 4
    assert loop.cost <= aten.cost < 1.2 * loop.cost
