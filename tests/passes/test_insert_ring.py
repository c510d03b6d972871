"""Ring attention, alone and with Ulysses: each way to run on parts, on two to four ranks of gloo, against one rank.

All cases are captured in this process, and run by ranks that are forked once for each grid.
"""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lib.helpers import capture, outcome_of, run_graph
from lib.marks import only_in
from lib.mixing import CASES, Model, attends, heads_of, joins_text, tokens
from lib.ranks import close, on_ranks

from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import op_counts
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.passes.insert_ulysses import ContextParallel, InsertUlysses
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.runtime.grid import Sizes, grid_of

pytestmark = pytest.mark.xdist_group("ulysses rules")

GRIDS = {"ring of 2": Sizes(ring=2), "ring of 3": Sizes(ring=3), "2 x 2": Sizes(ring=2, ulysses=2)}


def masked_text(layer, x, text, mask):
    """Text and image as one, with a mask of all pairs."""
    q, k, v = heads_of(layer, torch.cat([text, x], 1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return y[:, text.shape[1] :]


def without_heads(layer, x):
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


def other_values(layer, x):
    """Values of another size than queries and keys."""
    q, k, v = heads_of(layer, x)
    return F.scaled_dot_product_attention(q[..., :4], k[..., :4], v).transpose(1, 2).flatten(2)


def drops(layer, x):
    """Such a call is not passed around."""
    q, k, v = heads_of(layer, x)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9).transpose(1, 2).flatten(2)


def half(layer, x, mask):
    q, k, v = (each.bfloat16() for each in heads_of(layer, x))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).float()


def first_keys(rows, columns, seen):
    """A mask of pairs: all queries see the first keys alone, and the first query sees none."""
    mask = (torch.arange(columns) < seen).repeat(rows, 1)
    mask[0] = False
    return mask


MORE: dict[str, Any] = {
    "one head": lambda: (Model(attends, heads=1), tokens(7)),
    "one head, joined text": lambda: (Model(joins_text, heads=1), tokens(7), tokens(5)),
    "chunks without a key": lambda: (Model(attends), tokens(9), first_keys(9, 9, 2)),
    "chunks without a key, by numbers": lambda: (
        Model(attends),
        tokens(9, 2),
        torch.where(first_keys(9, 9, 2), 0.5, -torch.inf),
    ),
    "one column": lambda: (Model(attends), tokens(7), torch.randn(7, 1)),
    "mask of joined text": lambda: (
        Model(masked_text),
        tokens(7),
        tokens(5),
        torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(1)) > 0.4,
    ),
    "without heads": lambda: (Model(without_heads), tokens(7)),
    "other values": lambda: (Model(other_values), tokens(7)),
    "dropout": lambda: (Model(drops), tokens(7)),
    "fewest tokens": lambda: (Model(attends), tokens(4)),
    "half precision": lambda: (Model(half), tokens(7), first_keys(7, 7, 3)),
}
ALL = CASES | MORE
GATHERING = {"dropout", "no rule", "written along tokens"}
"""Cases whose blocks gather."""
RINGS = [(grid, case) for grid in GRIDS for case in ALL]
BY_DEFAULT = [
    *(("ring of 3", each) for each in ("causal", "by hand, mask", "grouped heads", "one head, joined text", "dropout")),
    *(("ring of 3", each) for each in ("chunks without a key", "fewest tokens", "without heads", "other values")),
    *(("2 x 2", each) for each in ("mask of heads", "mask of joined text", "two streams", "text", "one head")),
]
"""Cases of the default part. The part `parallel` has the other ones."""
FEW_HEADS = {
    *(("2 x 2", case) for case in ("one head", "one head, joined text", "without heads")),
    *((grid, case) for grid in ("ring of 3", "2 x 2") for case in ("by hand", "by hand, mask", "by einsum")),
}
"""Cases without a head for each of the ranks that exchange heads; by hand, all ranks do."""
TOLERANCE = {"half precision": 0.02}


@functools.cache
def graph(case):
    """The graph of a case."""
    torch.manual_seed(0)
    return capture(*ALL[case]())


@functools.cache
def results(grid, is_default):
    """For each rank: case -> (results, the fact, op counts), or the traceback of what it raised.

    Of the default part's cases, or of the other ones.
    """
    cases = [case for case in ALL if ((grid, case) in BY_DEFAULT) == is_default]
    for case in cases:
        graph(case)

    def run(rank):
        sizes, found = GRIDS[grid], dict[str, Any]()
        groups = grid_of(sizes)
        assert groups is not None
        names = ["" if each is None else each.name for each in (groups.tokens, groups.ulysses, groups.ring)]
        for case in cases:
            try:
                passes = InferSequenceAxes(sizes.tokens, sizes.ring), InsertUlysses(*names)
                outcome = outcome_of(graph(case).copy(), Normalize(), DetectBlockLoops(), *passes)
                outputs = run_graph(outcome.graph_module, graph(case).inputs)
                fact = outcome.facts.get(ContextParallel)
                found[case] = outputs, fact, op_counts(outcome.graph_module)
            except Exception:
                found[case] = traceback.format_exc()
        return found

    return on_ranks(run, GRIDS[grid].total)


@pytest.mark.budget(90, "captures the cases of a part, and three or four ranks run them")
@pytest.mark.parametrize(("grid", "case"), only_in("parallel", RINGS, but=BY_DEFAULT))
def test_equals_one_rank(grid, case):
    for found in results(grid, (grid, case) in BY_DEFAULT):
        assert not isinstance(found[case], str), found[case]
        outputs, fact, ops = found[case]
        tolerance = TOLERANCE.get(case, 2e-5)
        assert all(close(a, b, tolerance) for a, b in zip(outputs, graph(case).expected, strict=True))
        assert fact is not None and fact.share >= 0.5
        assert fact.rings == ops["ring_attention"] and fact.exchanges == ops["exchange"]
        gathers = case in GATHERING or (grid, case) in FEW_HEADS
        assert bool(fact.gathers) == gathers, fact.gathers


def test_a_ring_needs_no_exchange_and_a_grid_both():
    rings, grids = results("ring of 3", True)[0], results("2 x 2", True)[0]
    for case in ("causal", "grouped heads", "one head, joined text", "chunks without a key", "without heads"):
        assert rings[case][1].rings == 3 and rings[case][1].exchanges == 0
    _, fact, _ = grids["mask of joined text"]
    assert fact.rings == 3 and fact.exchanges == 3 * 4
    assert "keys and values of 3 calls of attention pass around a ring" in fact.note
    assert grids["text"][1].rings == 0


def test_blocks_stay_alike_and_ranks_have_one_text_but_for_their_groups():
    def codes(rank):
        groups = grid_of(GRIDS["2 x 2"])
        assert groups is not None and groups.tokens and groups.ulysses and groups.ring
        names = groups.tokens.name, groups.ulysses.name, groups.ring.name
        passes = InferSequenceAxes(4, 2), InsertUlysses(*names)
        outcome = outcome_of(graph("two streams").copy(), Normalize(), DetectBlockLoops(), *passes)
        code = outcome.graph_module.code
        for name, word in zip(names, ("tokens", "ulysses", "ring"), strict=True):
            code = code.replace(f"'{name}'", word)
        detection = DetectBlockLoops().run(outcome.graph_module, outcome.facts)
        return code, [loop.num_blocks for loop in detection.chain_loops]

    graph("two streams")
    first, *others = on_ranks(codes, 4)
    assert all(each == first for each in others) and first[1] == [3, 3]
