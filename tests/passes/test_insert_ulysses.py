"""InferSequenceAxes and InsertUlysses: each way to run on parts, on two and three ranks of gloo, against one rank.

All cases are captured in this process, and run by ranks that are forked once for each number of ranks.
"""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
from lib.helpers import capture, outcome_of, run_graph
from lib.mixing import CASES, graphs, tokens
from lib.ranks import close, on_ranks, ranks_of

from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import op_counts
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes, SequenceAxes
from cachedit_fx.passes.insert_ulysses import ContextParallel, InsertUlysses
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.overlap_collectives import OverlapCollectives

pytestmark = pytest.mark.xdist_group("ulysses rules")

GATHERED = {"no rule", "written along tokens"}
"""Cases whose blocks gather with two ranks."""
FEW_HEADS = {name for name in CASES if name not in GATHERED} - {
    "three heads", "mask of heads", "linear attention", "text", "grouped heads", "frames", "batch", "causal",
}  # fmt: skip
"""Cases whose two heads are fewer than three ranks."""

OVERLAPPED = ("odd length", "rotary in place", "linear attention", "two streams", "no rule", "written along tokens")
"""Cases that run once more, with collectives that run beside the computation."""


def rewritten(name, ranks, *more):
    """The outcome of the passes, and of `more`, on a case's graph, for all ranks."""
    group = ranks_of(ranks)
    assert group is not None
    passes = Normalize(), DetectBlockLoops(), InferSequenceAxes(ranks), InsertUlysses(group.name)
    return outcome_of(graphs()[name].copy(), *passes, *more)


@functools.cache
def results(ranks):
    """For each rank: case -> (results, the fact, op counts), or the traceback of what it raised.

    ("overlapped", case) -> results and op counts with collectives that run beside the computation.
    """
    graphs()

    def run(rank):
        found: dict[Any, Any] = {}
        for name, graph in graphs().items():
            try:
                outcome = rewritten(name, ranks)
                outputs = run_graph(outcome.graph_module, graph.inputs)
                found[name] = outputs, outcome.facts.get(ContextParallel), op_counts(outcome.graph_module)
                if ranks == 2 and name in OVERLAPPED:
                    overlapped = rewritten(name, ranks, OverlapCollectives()).graph_module
                    found["overlapped", name] = run_graph(overlapped, graph.inputs), op_counts(overlapped)
            except Exception:
                found[name] = traceback.format_exc()
        return found

    return on_ranks(run, ranks)


@pytest.mark.budget(60, "captures all cases, and two or three ranks run them")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_rank(case, ranks):
    for found in results(ranks):
        assert not isinstance(found[case], str), found[case]
        outputs, fact, _ = found[case]
        expected = graphs()[case].expected
        assert len(outputs) == len(expected)
        assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
        assert fact is not None and fact.share >= 0.5


@pytest.mark.parametrize("case", CASES)
def test_gathers_only_where_it_must(case):
    _, fact, ops = results(2)[0][case]
    assert bool(fact.gathers) == (case in GATHERED)
    assert ops["gather_sequence"] > 1 if case in GATHERED else ops["gather_sequence"] == 1  # one is for the result
    assert fact.share > 0.9 or case == "text" or case in GATHERED


@pytest.mark.parametrize("case", OVERLAPPED)
def test_overlap_changes_no_bit(case):
    for found in results(2):
        outputs, ops = found["overlapped", case]
        assert all(torch.equal(a, b) for a, b in zip(outputs, found[case][0], strict=True))
        assert not ops.keys().isdisjoint({"start_exchange", "start_gather_sequence", "start_sum_over_ranks"})


@pytest.mark.parametrize("case", sorted(FEW_HEADS))
def test_fewer_heads_than_ranks_gather_keys_and_values(case):
    _, fact, _ = results(3)[0][case]
    assert fact.gathers and fact.share > 0.9


def test_text_and_frames_need_no_exchange():
    found = results(2)[0]
    assert found["text"][1].exchanges == 0
    assert found["frames"][1].exchanges < 3 * 4 * 2
    assert found["plain"][1].exchanges == 3 * 4


def test_linear_attention_adds_up_over_ranks():
    _, fact, ops = results(2)[0]["linear attention"]
    assert ops["sum_over_ranks"] == 2 * 3 and fact.exchanges == 0


def test_blocks_stay_alike_and_ranks_have_one_text():
    def codes(rank):
        outcome = rewritten("two streams", 2)
        detection = DetectBlockLoops().run(outcome.graph_module, outcome.facts)
        return outcome.graph_module.code, [loop.num_blocks for loop in detection.chain_loops]

    graphs()
    first, second = on_ranks(codes)
    assert first == second and first[1] == [3, 3]


def test_one_rank_or_no_chain_match_nothing():
    gm = graphs()["plain"].copy()
    outcome = outcome_of(gm, Normalize(), DetectBlockLoops(), InferSequenceAxes(1), InsertUlysses(""))
    assert SequenceAxes not in outcome.facts and ContextParallel not in outcome.facts
    flat = capture(lambda x: x * 2 + 1, tokens(6))
    outcome = outcome_of(flat.gm, Normalize(), DetectBlockLoops(), InferSequenceAxes(2), InsertUlysses(""))
    assert ContextParallel not in outcome.facts
