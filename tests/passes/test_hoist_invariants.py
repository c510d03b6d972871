"""HoistInvariants: what leaves the pieces, where the cuts are, what must stay."""

import pytest
import torch
import torch.nn.functional as F
from lib import models
from lib.conditioned import Conditioned, conditions, sample, times
from lib.helpers import capture, outcome_of
from torch import nn

from cachedit_fx.config.cache import Cut
from cachedit_fx.lowering import structure_key
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.find_timestep import FindTimestep
from cachedit_fx.passes.graph_values import target_name
from cachedit_fx.passes.hoist_invariants import HOISTED, Hoisted, HoistInvariants
from cachedit_fx.passes.infer_dependence import InferDependence
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import KIND, OutlineBlocks
from cachedit_fx.passes.plan_regions import PlanRegions


def is_block(kind):
    return kind in ("block", "region")


def hoisted(model, *inputs, is_compiled=is_block, granularity="block", **more):
    """The outlined graph of a call, and the fact about it; None if nothing was hoisted."""
    graph = capture(model, *inputs, **more)
    outcome = outcome_of(graph.gm, *passes(is_compiled, granularity))
    return outcome.graph_module, outcome.facts.get(Hoisted)


def passes(is_compiled=is_block, granularity="block"):
    return [
        Normalize(),
        FindTimestep(),
        InferDependence(),
        DetectBlockLoops(),
        PlanRegions([Cut(1, 0)]),
        OutlineBlocks(granularity),
        HoistInvariants(is_compiled),
    ]


def ops_of(graph_module):
    return [target_name(node) for node in graph_module.graph.nodes if node.op in ("call_function", "call_method")]


def made_by(fact):
    """Names of the operations that make the hoisted values of blocks."""
    names = set()
    for piece in fact.pieces:
        if "block" in piece.name:
            names |= {target_name(node) for node in piece.code.graph.output_node().args[0]}
    return names


class Curved(models.Block):
    """The modulation bends after its matrix product."""

    def forward(self, x, temb):
        gate = torch.sigmoid(torch.tanh(torch.exp(self.modulation(F.silu(temb)))))[:, None].chunk(3, dim=-1)[0]
        return x + gate * self.attn(self.norm(x))


class WithBlocks(models.Toy):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))


def test_compiled_pieces_are_cut_where_values_lie_in_memory_anyway():
    _, compiled = hoisted(WithBlocks(Curved), *models.inputs())
    _, captured = hoisted(WithBlocks(Curved), *models.inputs(), is_compiled=lambda kind: False)
    assert made_by(compiled) == {"linear"}
    assert made_by(captured) == {"sigmoid"}


def contiguous(rows):
    return rows.contiguous()


def with_nothing(rows):
    """Recorded as contiguous. Inductor takes it for `rows`."""
    return torch.cat([rows, rows.new_zeros(len(rows), 0, rows.shape[-1])], 1)


class OnRows(models.Block):
    def __init__(self, arrange):
        super().__init__()
        self.arrange = arrange

    def forward(self, x, temb):
        rows = self.arrange(torch.stack([temb, -temb], -1).mT)
        gate = torch.tanh(self.modulation(rows)).chunk(3, dim=-1)[0].sum(1, keepdim=True)
        return x + gate * self.attn(self.norm(x))


@pytest.mark.parametrize(
    ("arrange", "names"), [(contiguous, {"linear"}), (torch.positive, set()), (with_nothing, set())]
)
def test_a_compiled_piece_is_not_cut_between_a_product_and_its_bias(arrange, names):
    """Inductor fuses the bias of a linear layer with what follows, unless the layer's input is contiguous."""
    _, fact = hoisted(WithBlocks(lambda: OnRows(arrange)), *models.inputs())
    assert made_by(fact) == names


def test_one_value_leaves_for_all_slices_and_blocks_stay_identical():
    gm, fact = hoisted(Conditioned(), sample(), times()[0], **conditions())
    blocks = [piece for piece in fact.pieces if piece.name.startswith("blocks_") and piece.is_timed]
    assert len(blocks) == 4 and all(len(piece.results) == 1 for piece in blocks)
    assert len({structure_key(piece.code) for piece in blocks}) == 1
    rest = {structure_key(gm.get_submodule(f"blocks_{index}")) for index in range(4)}
    assert len(rest) == 1
    assert "linear" in ops_of(gm.blocks_0) and ops_of(gm.blocks_0).count("linear") == 2  # to_q and the feed-forward


def test_what_was_hoisted_is_an_input_after_all_others():
    gm, fact = hoisted(Conditioned(), sample(), times()[0], **conditions())
    inputs = gm.graph.find_nodes(op="placeholder")
    is_hoisted = [HOISTED in node.meta for node in inputs]
    assert is_hoisted == sorted(is_hoisted)
    assert fact.inputs == tuple(node.meta[HOISTED] for node in inputs if HOISTED in node.meta)
    assert len(fact.names) == is_hoisted.count(False)
    calls = fact.graph_module.graph.find_nodes(op="call_module")
    assert [call.target for call in calls] == [piece.name for piece in fact.pieces]
    assert all(KIND in call.meta for call in calls)


def test_carried_values_stay():
    """The text that enters the first block depends on the prompt alone, but the blocks after it must be identical."""
    model, inputs = models.sd3(3)
    gm, fact = hoisted(model, **inputs)
    assert all(not piece.name.endswith("_conditions") for piece in fact.pieces if "block" in piece.name)
    assert structure_key(gm.transformer_blocks_0) == structure_key(gm.transformer_blocks_1)


def test_a_region_as_one_piece():
    gm, fact = hoisted(Conditioned(), sample(), times()[0], **conditions(), granularity="region")
    names = [piece.name for piece in fact.pieces if piece.is_timed]
    assert "middle_0_time" in names
    assert len(next(piece for piece in fact.pieces if piece.name == "middle_0_time").results) == 3


class Returns(Conditioned):
    """Hands a condition's projection to the caller, who may write to it."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled, ids):
        text = self.text(encoder_hidden_states)
        result = super().forward(hidden_states, timestep, encoder_hidden_states, pooled, ids)
        return result + text.mean(), text


class WritesToText(Conditioned):
    """Fills its text argument."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled, ids):
        encoder_hidden_states += 1
        return super().forward(hidden_states, timestep, encoder_hidden_states, pooled, ids)


class Draws(Conditioned):
    """Drops parts of the projected text at random."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled, ids):
        text = F.dropout(self.text(encoder_hidden_states), 0.5, training=True)
        return super().forward(hidden_states, timestep, text, pooled, ids)


def test_a_result_of_the_model_is_computed_in_place():
    gm, _ = hoisted(Returns(), sample(), times()[0], **conditions())
    returned = gm.graph.output_node().args[0]
    assert not any(HOISTED in node.meta for node in returned)


def test_a_graph_that_writes_to_its_inputs_keeps_everything():
    _, fact = hoisted(WritesToText(), sample(), times()[0], **conditions())
    assert fact is None


class Unconditioned(models.Block):
    """Sees the sample alone."""

    def forward(self, x, temb):
        return x + self.attn(self.norm(x))


def test_a_graph_with_nothing_to_hoist_is_as_without_the_pass():
    """So a step takes the time that it takes without the pass."""
    gm, fact = hoisted(WithBlocks(Unconditioned), *models.inputs())
    plain = outcome_of(capture(WithBlocks(Unconditioned), *models.inputs()).gm, *passes()[:-1]).graph_module
    with_pass, without = ([piece.code for piece in each.modules() if hasattr(piece, "code")] for each in (gm, plain))
    assert fact is None and with_pass == without and len(without) > 4


def test_random_numbers_stay():
    _, fact = hoisted(Draws(), sample(), times()[0], **conditions())
    names = {fact.names[index] for piece in fact.pieces if "block" in piece.name for index in piece.inputs}
    assert names == {"timestep", "pooled"}  # keys and values come from what was drawn


@pytest.mark.parametrize("scales", [False, True])
def test_shares(scales):
    _, fact = hoisted(Conditioned(scales=scales), sample(), times()[0], **conditions())
    shares = fact.by_inputs()
    width = models.WIDTH
    assert shares["timestep", "pooled"].weights == 4 * (3 * width * width + 3 * width) + 2 * width * width + 2 * width
    assert shares["ids",].bytes == 6 * width * 4
    assert sum(share.values for share in shares.values()) == fact.count
