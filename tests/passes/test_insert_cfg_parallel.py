"""InferBatchAxis and InsertCfgParallel: batches cut over two ranks of gloo, against one, at sizes that vary."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lib.helpers import capture, outcome_of, run_graph
from lib.mixing import WIDTH, Model, attends
from lib.ranks import close, on_ranks, ranks_of
from torch import nn

from cachedit_fx.bench.ulysses import pretended
from cachedit_fx.config.options import parse_options
from cachedit_fx.pass_pipeline import pass_manager
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.infer_batch_axis import InferBatchAxis
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.passes.insert_cfg_parallel import BatchParallel, InsertCfgParallel
from cachedit_fx.passes.insert_ulysses import ContextParallel, InsertUlysses
from cachedit_fx.passes.normalize import Normalize


class Picture(nn.Module):
    """Blocks on the tokens of pictures, whose pixels are put side by side at the end: [batch, height, width, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.blocks = Model(attends)

    def forward(self, x):
        tokens = self.blocks(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        pixels = tokens.unflatten(-1, (2, 2, WIDTH // 4)).permute(0, 1, 3, 2, 4, 5)
        return pixels.flatten(3, 4).flatten(1, 2)


BY: dict[str, Any] = {
    "batch": lambda group: (InferBatchAxis(2), InsertCfgParallel(group)),
    "tokens": lambda group: (InferSequenceAxes(2), InsertUlysses(group)),
}
FACTS = {"batch": BatchParallel, "tokens": ContextParallel}


@functools.cache
def graph(batch, is_dynamic):
    torch.manual_seed(0)
    return capture(Picture(), torch.randn(batch, 6, 4, WIDTH), dynamic=is_dynamic)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("batch", "is_dynamic"), [(2, True), (3, False), (5, True)])
def test_sizes_that_the_end_makes_of_others(by, batch, is_dynamic):
    """An axis of the result is made of two, and is no input's: the product of their lengths has no node."""
    captured = graph(batch, is_dynamic)

    def run(rank):
        group = ranks_of(2)
        assert group is not None
        outcome = outcome_of(captured.copy(), Normalize(), DetectBlockLoops(), *BY[by](group.name))
        outcome.graph_module.graph.lint()
        return run_graph(outcome.graph_module, captured.inputs), outcome.facts.get(FACTS[by])

    for outputs, fact in on_ranks(run):
        assert fact is not None and fact.share > 0.9
        assert all(close(a, b) for a, b in zip(outputs, captured.expected, strict=True))


def test_all_ranks_find_the_same_blocks_in_parts_of_one_sample():
    """A batch of 3 samples on two ranks is 2 and 1, and torch's shapes of a part of one may be numbers."""
    captured, found = graph(6, True), []
    off = dict.fromkeys(("outline_blocks", "hoist_invariants", "insert_cache_branch", "gather_inputs"), False)
    for rank in range(4):
        with pretended(4, rank):
            options = parse_options({"cfg_parallel": True, "ulysses_size": 2, "inner_backend": "eager", "passes": off})
            outcome = pass_manager(options).run(captured.copy())
        found.append([(loop.name, loop.num_blocks) for loop in outcome.facts[Detection].loops])
    assert found == [[("blocks.blocks", 3)]] * 4
