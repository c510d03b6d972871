"""Outlining: the pieces, their inputs and layouts, twins that have one key."""

import itertools

import pytest
import torch
from lib import models
from lib.cases import CASES, SumsLengths, graph_of, text
from lib.helpers import capture, find, ops, run_passes
from lib.marks import SHARES_GRAPHS
from torch.fx.experimental.symbolic_shapes import free_symbols

from cachedit_fx.config.cache import Cut
from cachedit_fx.lowering import structure_key
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import target_name
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import PlanRegions

pytestmark = SHARES_GRAPHS


def outlined(gm, first=None, last=0, **options):
    """Without a region if `first` is None."""
    regions = () if first is None else (PlanRegions([Cut(first, last)]),)
    return run_passes(gm, Normalize(), DetectBlockLoops(), *regions, OutlineBlocks(**options))


def names_of(gm):
    """The pieces' names, in order."""
    return tuple(node.target for node in gm.graph.nodes if node.op == "call_module")


def pieces(gm):
    """name -> piece."""
    return {name: getattr(gm, name) for name in names_of(gm)}


def keys(gm):
    return {name: structure_key(piece) for name, piece in pieces(gm).items()}


def distinct(gm):
    return len(set(keys(gm).values()))


@pytest.mark.parametrize("case", CASES)
def test_keeps_numerics_and_operations(case):
    graph = graph_of(CASES[case])
    normalized = run_passes(graph.copy(), Normalize())
    for granularity, first in itertools.product(("block", "region"), (None, 0, 2)):
        gm = outlined(graph.copy(), first, granularity=granularity)
        assert graph.same(gm)
        assert counted(gm) == counted(normalized), "every operation stands in one piece"


def counted(gm):
    return {name: count for name, count in ops(gm).items() if name not in ("getitem", "contiguous")}


def test_pieces_in_order():
    graph = capture(models.TwoLoops(2, 3), *models.inputs(), text())
    gm = outlined(graph.gm, 1)
    assert names_of(gm) == (
        "prologue",
        "double_blocks_0",
        "double_blocks_1",
        "single_blocks_0",
        "single_blocks_1",
        "single_blocks_2",
        "epilogue",
    )
    # What only moves data between the loops is no piece.
    assert [target_name(n) for n in gm.graph.nodes if n.op == "call_function" and n.target is torch.cat] == ["cat"]
    assert {node.op for node in gm.graph.nodes} == {"placeholder", "call_module", "call_function", "output"}


def test_granularity_region_makes_three_pieces():
    graph = graph_of(CASES["two loops"])
    gm = outlined(graph.gm, 1, 1, granularity="region")
    assert names_of(gm) == ("prologue", "middle_0", "epilogue")
    assert ops(pieces(gm)["middle_0"])["scaled_dot_product_attention"] == 3 + 4 - 2
    assert names_of(outlined(graph_of(CASES["plain"]).gm, granularity="region")) == ("model",)


@pytest.mark.parametrize(
    "case, count",
    [("plain", 3), ("two loops", 4), ("no glue", 5), ("last differs", 3), ("in place", 3), ("batch of two", 4)],
)
def test_twins_have_one_key(case, count):
    """Prologue, epilogue where there is one, a block for each loop, one more for a last block that drops a stream."""
    graph = graph_of(CASES[case])
    assert distinct(outlined(graph.gm, 1)) == count


def test_weights_are_inputs():
    gm = outlined(graph_of(CASES["plain"]).gm)
    for name, piece in pieces(gm).items():
        assert not any(node.op == "get_attr" for node in piece.graph.nodes)
        weights = [n for n in piece.graph.nodes if isinstance(n.meta.get("example_value"), torch.nn.Parameter)]
        assert len(weights) == (12 if name.startswith("blocks") else 2)


@pytest.mark.parametrize("canonical", [True, False])
def test_streams_leave_in_one_layout(canonical):
    """A joint block hands on slices of what it attended; the successor of the first would see other strides."""

    class Slices(models.JointBlock):
        def forward(self, hidden, text, temb):
            length = text.shape[1]
            joint = torch.cat([text, hidden], 1)
            joint = joint + self.attn(joint + temb[:, None])
            return joint[:, :length], joint[:, length:]

    class Slicing(models.LastDiffers):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Slices() for _ in range(4))

        def forward(self, hidden_states, timestep, text):
            return super().forward(hidden_states, timestep, text), 1

    graph = capture(Slicing(), *models.inputs(batch=2), text(2))
    gm = outlined(graph.gm, 1, canonical_layout=canonical)
    blocks = {name: piece for name, piece in pieces(gm).items() if name.startswith("blocks")}
    strides = {
        value.meta["example_value"].stride()[0]
        for piece in blocks.values()
        for value in next(n for n in piece.graph.nodes if n.op == "output").args[0]
    }
    assert strides == ({5 * 16, 6 * 16} if canonical else {11 * 16})
    assert len({structure_key(piece) for piece in blocks.values()}) == (2 if canonical else 3)
    assert graph.same(gm)


def test_dynamic_shapes_symbols_are_inputs():
    graph = capture(models.TwoLoops(), *models.inputs(batch=2), text(2), dynamic=True)
    gm = outlined(graph.gm, 1)
    assert graph.same(gm)
    for piece in pieces(gm).values():
        values = [n.meta["example_value"] for n in piece.graph.nodes if n.op == "placeholder"]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        free = {str(symbol) for tensor in tensors for symbol in free_symbols(tensor)}
        assert free <= {str(value) for value in values if isinstance(value, torch.SymInt)}
    assert distinct(gm) == 4  # as with fixed shapes


def test_lengths_that_the_first_block_asks_for():
    """The first of the blocks must be a twin of the others all the same."""

    graph = capture(SumsLengths(), torch.randn(2, 5, 4), torch.randn(2, 3, 4), dynamic=True)
    gm = outlined(graph.gm, 1)
    blocks = {key for name, key in keys(gm).items() if name.startswith("blocks")}
    assert len(blocks) == 1
    assert graph.same(gm)


def test_what_cannot_cross_is_made_again():
    """A size is a tuple: the last block, which needs it here, asks for it itself."""
    graph = graph_of(CASES["plain"])
    normalized = run_passes(graph.gm, Normalize())
    embed = find(normalized, "linear")[0]
    last = find(normalized, "linear")[-1]
    with normalized.graph.inserting_after(embed):
        size = normalized.graph.call_method("size", (embed,))
    size.meta["example_value"] = torch.Size((1, 6, 16))
    source = last.all_input_nodes[0]
    with normalized.graph.inserting_before(last):
        shaped = normalized.graph.call_method("reshape", (source, size))
    shaped.meta = dict(source.meta)
    last.replace_input_with(source, shaped)
    gm = outlined(normalized, 1)
    made = pieces(gm)
    assert [name for name in made if ops(made[name])["size"]] == ["prologue", "blocks_3"]
    (call,) = (node for node in gm.graph.nodes if node.target == "blocks_3")
    assert all(isinstance(item.meta["example_value"], torch.Tensor) for item in call.args)
    assert graph.same(gm)


def test_contexts_are_not_cut():
    class Autocast(models.Toy):
        def forward(self, hidden_states, timestep):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(hidden_states, timestep)

    graph = capture(Autocast(), *models.inputs())
    gm = outlined(graph.gm)
    for piece in pieces(gm).values():
        assert ops(piece)["_enter_autocast"] == ops(piece)["_exit_autocast"]
    assert graph.same(gm)


def test_no_loop_leaves_the_graph_untouched():
    graph = capture(torch.nn.Linear(4, 4), torch.randn(2, 4))
    gm = outlined(graph.gm)
    assert gm is graph.gm and names_of(gm) == ()


@pytest.mark.parametrize("case", [models.flux, models.sd3])
def test_diffusers(case):
    graph = graph_of(case)
    gm = outlined(graph.gm, 1, 1)
    assert graph.same(gm)
    # FLUX: prologue, joint, single, last single, epilogue; SD3: prologue, joint, last, epilogue.
    assert distinct(gm) == (5 if case is models.flux else 4)
